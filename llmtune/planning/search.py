"""The best layout of a run on a topology: found by estimate, confirmed by the compiler.

strategies x meshes x remat policies x microbatches  --fit, by estimate-->  ranked by least time  --compile-->  the best few
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.file import dump_run
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.layout import Layout, lay_out, with_strategy, with_train
from llmtune.planning.plan import Compile, Note, Plan, plan_layout
from llmtune.planning.roofline import Roofline
from llmtune.planning.topology import Topology, devices
from llmtune.sharding import MESH_AXES, ShardingError, load_strategy
from llmtune.shipped import configs_directory
from llmtune.training.remat import POLICIES
from llmtune.training.vocabulary import settle_vocabulary

MICROBATCHES = (1, 2, 4, 8, 16)
COMPILED = 3  # of the best by estimate
ROOM = 1.05  # an estimate must leave this much of the memory, for what it may be wrong by


def search(
    run: Run, topology: Topology, strategies: Sequence[str], compile_layout: Compile, note: Note, count: int = COMPILED
) -> list[Plan]:
    """Plans of the `count` best layouts that fit, the best first; layouts that the compiler needs more for are left behind.

    Raises LlmtuneConfigError where none fits, with the one that comes nearest.
    """
    source, _ = settle_vocabulary(run, pretrained.open_source(run.model))
    placed = devices(topology)
    names = list(strategies) or sorted(path.stem for path in (configs_directory() / "strategies").glob("*.yaml"))
    layouts = [own for name in names for own in layouts_of(run, source, topology, placed, name)]
    if not layouts:
        raise LlmtuneConfigError(f"--search: no strategy of {', '.join(names)} divides this model over {topology.name}")
    limit = topology.chip.hbm_bytes
    fitting = sorted((own for own in layouts if own.memory.total * ROOM <= limit), key=lambda own: rank(own.times()))
    note(f"{len(layouts)} layouts of {len(names)} strategies; {len(fitting)} fit by estimate")
    if not fitting:
        least = min(layouts, key=lambda own: own.memory.total)
        raise LlmtuneConfigError(
            f"--search: nothing fits {topology.name}; {least.strategy.name} with {least.run.train.microbatches} microbatches "
            f"comes nearest, {least.memory.total / 1e9:.1f} GB of {limit / 1e9:.1f} GB; take a larger topology or a smaller batch"
        )
    found: list[Plan] = []
    for layout in _different(fitting):
        plan = plan_layout(layout, compile_layout, note)
        found += [plan] if plan.fits else []
        if len(found) == count:
            break
    return sorted(found, key=lambda plan: rank(plan.times))


def rank(times: Roofline) -> tuple[float, float]:
    """Smaller is better: the time when all overlaps, to two digits, then the time when nothing does."""
    return float(f"{times.overlapped:.2g}"), times.apart


def layouts_of(
    run: Run, source: pretrained.Source, topology: Topology, placed: Sequence[Any], name: str
) -> Iterator[Layout]:
    """Every mesh of one strategy that divides the model and the batch, under every remat policy and number of microbatches."""
    axes = mesh_axes(name)
    for sizes in meshes(len(placed), axes, topology.slices):
        try:
            layout = lay_out(with_train(with_strategy(run, name, sizes), microbatches=1), source, topology, placed)
        except (ShardingError, LlmtuneConfigError):
            continue
        for remat, pieces in itertools.product(POLICIES, MICROBATCHES):
            if layout.divides(pieces):
                yield layout.again(remat=remat, microbatches=pieces)


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that a strategy splits something over."""
    table = load_strategy(name, configs_directory() / "strategies")
    used = {axis for own in table.axes.values() for axis in own}
    return tuple(axis for axis in MESH_AXES if axis in used)


def meshes(count: int, axes: Sequence[str], slices: int) -> Iterator[Mapping[str, int]]:
    """All sizes of these axes that multiply to `count`; `replica` is for slices alone, whose network is slow."""
    free = [axis for axis in axes if axis != "replica"]
    replicas = slices if "replica" in axes else 1
    if (slices > 1 and replicas == 1) or not free:
        return
    for sizes in _factors(count // replicas, len(free)):
        yield {**({"replica": replicas} if replicas > 1 else {}), **dict(zip(free, sizes, strict=True))}


def write_layout(plan: Plan, target: Path) -> None:
    """The whole configuration with the plan's layout in it, for `llmtune train`."""
    target.write_text(dump_run(plan.layout.run), encoding="utf-8")


def _different(layouts: Sequence[Layout]) -> Iterator[Layout]:
    """The layouts in order, of each strategy and mesh the best one first, and the others only after all those."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    later = []
    for own in layouts:
        key = own.strategy.name, tuple(own.sizes.values())
        if key in seen:
            later.append(own)
        else:
            seen.add(key)
            yield own
    yield from later


def _factors(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (count,)
        return
    for size in range(1, count + 1):
        if count % size == 0:
            yield from ((size, *rest) for rest in _factors(count // size, parts - 1))
