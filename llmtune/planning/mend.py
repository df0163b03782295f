"""The nearest change that makes a run fit: found by trying, first by estimate, then by the compiler.

    remat block  ->  microbatches  ->  the host's memory  ->  another strategy  ->  4-bit base of an adapter  ->  a larger slice

Changes come in the order of what they cost a user: time, then another layout, then another result, then money.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.quantize import Quantize
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.candidates import MICROBATCHES, ROOM, best_mesh
from llmtune.planning.layout import Layout, describe_mesh, lay_out, with_train
from llmtune.planning.plan import Compile, Note, Plan, plan_layout
from llmtune.planning.topology import Topology, devices, larger
from llmtune.sharding import ShardingError
from llmtune.shipped import configs_directory

TRIES = 2  # programs compiled of each kind of change before the next kind has its turn


@dataclasses.dataclass(frozen=True)
class Mended:
    """What to change, as a user would write it, and the plan of the run with the change in it."""

    change: str
    plan: Plan


def mend(plan: Plan, compile_layout: Compile, note: Note) -> Mended | None:
    """The nearest change that fits, compiled; None where none was found."""
    for kind in kinds_of_change(plan.layout):
        fitting = (own for own in kind if own[1].memory.total * ROOM <= own[1].topology.chip.hbm_bytes)
        for change, layout in itertools.islice(fitting, TRIES):
            note(f"trying {change}")
            found = plan_layout(layout, compile_layout, note)
            if found.fits:
                return Mended(change, found)
    return None


def kinds_of_change(layout: Layout) -> list[Iterator[tuple[str, Layout]]]:
    """(what is changed, the layout with it), the nearest first, of each kind; found as they are asked for."""
    placed = devices(layout.topology)
    return [
        _within(layout, ""),
        _on_host(layout, placed),
        _other_strategies(layout, placed),
        _quantised(layout, placed),
        _larger(layout),
    ]


def _other_strategies(layout: Layout, placed: Sequence) -> Iterator[tuple[str, Layout]]:
    for path in sorted((configs_directory() / "strategies").glob("*.yaml")):
        if path.stem == layout.strategy.name:
            continue
        own = best_mesh(layout.run, layout.source, layout.topology, placed, path.stem)
        if own is not None:
            said = f"sharding.strategy {path.stem}, sharding.mesh {describe_mesh(own.sizes)}"
            yield said, own
            yield from _within(own, f"{said}, ")


def _quantised(layout: Layout, placed: Sequence) -> Iterator[tuple[str, Layout]]:
    run = layout.run
    if run.adapt is None or run.quantize is not None:
        return
    own = _laid_out(dataclasses.replace(run, quantize=Quantize(base="nf4")), layout.source, layout.topology, placed)
    if own is not None:
        yield "quantize.base nf4", own
        yield from _within(own, "quantize.base nf4, ")


def _larger(layout: Layout) -> Iterator[tuple[str, Layout]]:
    for bigger in larger(layout.topology):
        own = best_mesh(layout.run, layout.source, bigger, devices(bigger), layout.strategy.name)
        if own is not None:
            yield f"--topology {bigger.name}", own


def _within(layout: Layout, before: str) -> Iterator[tuple[str, Layout]]:
    """Less kept for the backward pass, and fewer rows at a time."""
    train = layout.run.train
    kept = [train.remat] if train.remat == "block" else [train.remat, "block"]
    for remat in kept:
        for pieces in MICROBATCHES:
            own = with_train(layout.run, remat=remat, microbatches=pieces)
            said = [f"train.remat {remat}"] * (remat != train.remat) + [f"train.microbatches {pieces}"] * (
                pieces != train.microbatches
            )
            if said and pieces >= train.microbatches and layout.divides(pieces):
                yield before + ", ".join(said), dataclasses.replace(layout, run=own)


def _on_host(layout: Layout, placed: Sequence) -> Iterator[tuple[str, Layout]]:
    """What blocks begin with, the optimizer's state, and both, waiting in the host's memory: of TPUs, whose compiler knows it."""
    run = layout.run
    if layout.mesh.devices.flat[0].platform != "tpu":
        return
    if run.train.remat != "offload":
        yield "train.remat offload", layout.again(remat="offload")
    if run.optimizer.memory == "host" or run.optimizer.name == "schedule_free_adamw":
        return
    moved = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, memory="host"))
    own = _laid_out(moved, layout.source, layout.topology, placed)
    if own is not None:
        yield "optimizer.memory host", own
        yield from _within(own, "optimizer.memory host, ")
        if run.train.remat != "offload":
            yield "optimizer.memory host, train.remat offload", own.again(remat="offload")


def _laid_out(run: Run, source: pretrained.Source, topology: Topology, placed: Sequence) -> Layout | None:
    """None where the layout does not divide the model, or the batch."""
    try:
        return lay_out(run, source, topology, placed)
    except (ShardingError, LlmtuneConfigError):
        return None
