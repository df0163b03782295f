"""The best layout of a run on a topology: found by estimate, confirmed by the compiler.

strategies x meshes x remat policies x microbatches  --fit, by estimate-->  ranked by least time  --compile-->  the best few
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.file import dump_run
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.candidates import ROOM, layouts_of, rank
from llmtune.planning.layout import Layout
from llmtune.planning.plan import Compile, Note, Plan, plan_layout
from llmtune.planning.topology import Topology, devices
from llmtune.shipped import configs_directory
from llmtune.training.vocabulary import settle_vocabulary

COMPILED = 3  # of the best by estimate
TRIES = 3 * COMPILED  # programs compiled before it is left at those that fit


def search(
    run: Run, topology: Topology, strategies: Sequence[str], compile_layout: Compile, note: Note, count: int = COMPILED
) -> list[Plan]:
    """Plans of the `count` best layouts that fit, the best first; layouts that the compiler needs more for are left behind.

    Raises LlmtuneConfigError where none fits, with the one that comes nearest by estimate.
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
    for layout in itertools.islice(different(fitting), TRIES):
        plan = plan_layout(layout, compile_layout, note)
        found += [plan] if plan.fits else []
        if len(found) == count:
            break
    if not found:
        raise LlmtuneConfigError(
            f"--search: {min(len(fitting), TRIES)} layouts fit {topology.name} by estimate, and none by the compiler; take "
            "a larger topology or a smaller batch"
        )
    return sorted(found, key=lambda plan: rank(plan.times))


def write_layout(plan: Plan, target: Path) -> None:
    """The whole configuration with the plan's layout in it, for `llmtune train`."""
    target.write_text(dump_run(plan.layout.run), encoding="utf-8")


def different(layouts: Sequence[Layout]) -> Iterator[Layout]:
    """The layouts in order, of each table and mesh the best one first, and the others only after all those.

    Strategies that come to the same on a mesh, since they differ along axes of one device only, are one.
    """
    seen: set[str] = set()
    later = []
    for own in layouts:
        table = own.strategy
        splits = [sorted((name, over) for name, over in part.items() if over) for part in (table.axes, table.state)]
        key = repr((splits, table.gather, own.sizes))
        same = key + repr(own.run.train)
        if same not in seen:
            if key in seen:
                later.append(own)
            else:
                yield own
            seen |= {key, same}
    yield from later
