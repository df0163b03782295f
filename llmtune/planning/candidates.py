"""The layouts that a run could have: every mesh of a strategy, every remat policy, every number of microbatches.

fsdp_tensor on 8 devices   fsdp 1 x tensor 8, fsdp 2 x tensor 4, ...     those that divide the model, the batch and the torus
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmtune import pretrained
from llmtune.config import Run
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.layout import Layout, lay_out, with_strategy, with_train
from llmtune.planning.roofline import Roofline
from llmtune.planning.topology import Topology
from llmtune.sharding import MESH_AXES, ShardingError, load_strategy
from llmtune.shipped import configs_directory

MICROBATCHES = (1, 2, 4, 8, 16)
SEARCHED = ("none", "dots", "attention", "block")  # not `offload`: no figures of the way to a host's memory are at hand
ROOM = 1.05  # an estimate must leave this much of the memory, for what it may be wrong by


def best_mesh(
    run: Run, source: pretrained.Source, topology: Topology, placed: Sequence[Any], name: str
) -> Layout | None:
    """The run as it is, on the mesh of this strategy that promises most: the fastest that fits, or the one that needs least.

    Of meshes on which the strategy is itself, with more than one device along each of its axes, where there are any.
    """
    kept = run.train.remat, run.train.microbatches
    own = [
        layout
        for layout in layouts_of(run, source, topology, placed, name)
        if (layout.run.train.remat, layout.run.train.microbatches) == kept
    ]
    free = [axis for axis in mesh_axes(name) if axis != "replica"]
    own = [layout for layout in own if all(layout.sizes[axis] > 1 for axis in free)] or own
    fitting = [layout for layout in own if layout.memory.total * ROOM <= topology.chip.hbm_bytes]
    if fitting:
        return min(fitting, key=lambda layout: rank(layout.times()))
    return min(own, key=lambda layout: layout.memory.total, default=None)


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
        for remat, pieces in itertools.product(dict.fromkeys((*SEARCHED, run.train.remat)), MICROBATCHES):
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


def _factors(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (count,)
        return
    for size in range(1, count + 1):
        if count % size == 0:
            yield from ((size, *rest) for rest in _factors(count // size, parts - 1))
