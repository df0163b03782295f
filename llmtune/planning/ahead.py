"""The very train step of a run, compiled for devices that are not here, and what its compiler says of it.

libtpu compiles for any topology on any machine; nothing runs. The program's text and the compiler's reports come from a dump
into a temporary directory, because jaxlib cannot read back every program that libtpu writes.
"""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llmtune import pretrained
from llmtune.config import Run
from llmtune.planning.abstract import abstract_program
from llmtune.planning.collectives import Collective, collectives
from llmtune.planning.hlo import kernels, read
from llmtune.sharding import Strategy

# Collectives are not cut into pieces that run beside pieces of a product: such programs take minutes to compile at 256 devices.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
OUT_OF_MEMORY = re.compile(
    r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)|Used ([\d.]+)([KMG]) of ([\d.]+)([KMG])"
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Compiled:
    """Bytes per device: `peak` of all that is alive at a time, `arguments` of what goes in. `seconds` it took to compile.

    `fits` False: the compiler refused the program; peak is then what it says was needed, and nothing else is known.
    `kernels`: names of custom kernels in the program.
    """

    fits: bool
    peak: int
    arguments: int
    temporaries: int
    code: int
    collectives: tuple[Collective, ...]
    kernels: tuple[str, ...]
    seconds: float
    cpu_seconds: float


def compile_step(run: Run, source: pretrained.Source, mesh: Mesh, strategy: Strategy) -> Compiled:
    """Compile the run's train step for the mesh's devices. Raises what `abstract_program` raises, before it compiles."""
    with jax.set_mesh(mesh):
        program, inputs = abstract_program(run, source, mesh, strategy)
        start, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory(prefix="llmtune-plan-") as directory:
            compiled, refused = _compile(program.lower(inputs.state, inputs.batch), mesh, Path(directory))
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
            if compiled is None:
                return Compiled(False, refused, 0, 0, 0, (), (), seconds, cpu_seconds)
            text = _text(compiled, Path(directory))
    memory: Any = compiled.memory_analysis()
    module = read(text)
    return Compiled(
        True,
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        tuple(collectives(module, mesh.axis_names, tuple(mesh.shape.values()))),
        tuple(kernels(module)),
        seconds,
        cpu_seconds,
    )


def _compile(lowered: jax.stages.Lowered, mesh: Mesh, directory: Path) -> tuple[jax.stages.Compiled | None, int]:
    """The compiled program; or None, and the bytes that it would have needed."""
    options: dict[str, Any] = {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}
    if mesh.devices.flat[0].platform == "tpu":
        options |= TPU_OPTIONS
    try:
        return lowered.compile(compiler_options=options), 0
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        needed, unit = (found[1], found[2]) if found[1] else (found[5], found[6])
        return None, round(float(needed) * UNITS[unit])


def _text(compiled: jax.stages.Compiled, directory: Path) -> str:
    """The optimised program, from the dump of the module that the step became."""
    dumps = sorted(directory.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
    return dumps[-1].read_text(encoding="utf-8") if dumps else compiled.as_text() or ""
