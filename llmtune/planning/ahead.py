"""The very train step of a run, given to the compiler of devices that are not here, and what it says of the program.

libtpu compiles for any topology on any machine; nothing runs. The program's text and the compiler's reports come from a dump
into a temporary directory: jaxlib cannot read back every program that libtpu writes, and the reports are there also of a
program that does not fit.

    compile_step   to the end: the program is known to be one that the device can be given
    assign_step    until every buffer has its place: memory and exchanges are final, machine code is not made. Most of the time
                   of a compilation goes into machine code, so that this takes a small part of it; what can still fail is a kernel
                   that does not fit the vector memory
"""

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llmtune.config.file import dump_run
from llmtune.errors import LlmtuneError
from llmtune.planning import gpu_target
from llmtune.planning.abstract import device_bytes
from llmtune.planning.collectives import Collective, collectives
from llmtune.planning.hlo import kernels, read
from llmtune.planning.layout import Layout

# Collectives are not cut into pieces that run beside pieces of a product: such programs take minutes to compile at 256 devices.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
REPORT, PROGRAM = "*memory-usage-report.txt", "*after_optimizations.txt"
LAST = "*after_optimizations_after_buffer_assignment.txt"  # written when buffers have their places
NEEDED = re.compile(r"Memory Space: default .*\nTotal bytes: (\d+)")
PATIENCE = 3600  # seconds


@dataclass(frozen=True)
class Compiled:
    """Bytes on a device: `arguments` go in; `needed` is what the program reserves, arguments included, and must be there.

    `alive`: the most that the compiler sees in use at one time, less than it reserves; None where machine code was not made.
    `kernels`: names of the custom kernels in the program. `seconds`: what it took.
    """

    arguments: int
    needed: int
    alive: int | None
    collectives: tuple[Collective, ...]
    kernels: tuple[str, ...]
    seconds: float


def compile_step(layout: Layout) -> Compiled:
    """Compile the step of a layout for the devices of its mesh."""
    start, alive, inputs = time.perf_counter(), None, layout.inputs
    with jax.set_mesh(layout.mesh), tempfile.TemporaryDirectory(prefix="llmtune-plan-") as name:
        directory = Path(name)
        lowered = layout.program.lower(inputs.state, inputs.batch)
        try:
            compiled = lowered.compile(compiler_options=dumping(directory, layout.mesh))
            memory: Any = compiled.memory_analysis()
            alive = memory.peak_memory_in_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or not list(directory.glob(REPORT)):
                raise
        return _read(directory, layout, alive, time.perf_counter() - start)


def assign_step(layout: Layout) -> Compiled:
    """The same without machine code, by a process of its own that is ended when the compiler's reports are there."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llmtune-plan-") as name:
        directory = Path(name)
        (directory / "run.yaml").write_text(dump_run(layout.run), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "llmtune.planning.child",
            str(directory / "run.yaml"),
            layout.topology.name,
            name,
        ]
        with (directory / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as child:
            try:
                _wait_for_reports(directory, child)
            finally:
                child.kill()
        return _read(directory, layout, None, time.perf_counter() - start)


def dumping(directory: Path, mesh: Mesh) -> dict[str, Any]:
    """Compiler options for this mesh's platform, with its reports into a directory."""
    own = {"tpu": TPU_OPTIONS, "gpu": gpu_target.OPTIONS}.get(mesh.devices.flat[0].platform, {})
    return {**own, "xla_dump_hlo_as_text": True, "xla_dump_to": str(directory)}


def _wait_for_reports(directory: Path, child: subprocess.Popen) -> None:
    """Until every report is whole. Raises what the child's log says where it ends without them."""
    begun = time.monotonic()
    while not all(list(directory.glob(pattern)) for pattern in (REPORT, PROGRAM, LAST)):
        if child.poll() is not None:
            if all(list(directory.glob(pattern)) for pattern in (REPORT, PROGRAM)):
                return  # refused, after it said how much it would take
            said = (directory / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise LlmtuneError(f"plan: the compiler ended without a program: {said[-1] if said else 'it said nothing'}")
        if time.monotonic() - begun > PATIENCE:
            raise LlmtuneError(f"plan: the compiler took more than {PATIENCE} seconds")
        time.sleep(0.2)
    before: list[int] = []
    while before != (now := [path.stat().st_size for path in sorted(directory.glob("*.txt"))]):
        before = now
        time.sleep(0.5)


def _read(directory: Path, layout: Layout, alive: int | None, seconds: float) -> Compiled:
    """What the reports say. A program of several modules has one step, the largest."""
    text = max((path.read_text(encoding="utf-8") for path in directory.glob(PROGRAM)), key=len)
    found = [NEEDED.search(path.read_text(encoding="utf-8")) for path in directory.glob(REPORT)]
    module, inputs, mesh = read(text), layout.inputs, layout.mesh
    return Compiled(
        arguments=device_bytes(jax.tree.leaves((inputs.state, inputs.weights.frozen, inputs.batch))),
        needed=max(int(match[1]) for match in found if match),
        alive=alive,
        collectives=tuple(collectives(module, mesh.axis_names, tuple(mesh.shape.values()))),
        kernels=tuple(kernels(module)),
        seconds=seconds,
    )
