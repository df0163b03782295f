"""The device mesh. Its axes are typed explicit: a layout that does not fit is a Python error, on a laptop, at trace time.

A single device is the mesh of sizes 1; there is no code path without a mesh.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmtune.sharding.strategy import MESH_AXES, ShardingError, Strategy

Devices = Sequence[Any]  # of jax.Device, which is a class only at run time


def make_mesh(sizes: Mapping[str, int], devices: Devices | None = None) -> Mesh:
    """A mesh over all `devices` (default: all there are). One size may be -1: what the others leave over.

    Raises ShardingError where the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ShardingError(f"sharding.mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(MESH_AXES)}")
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in shape.values()):
        raise ShardingError(f"sharding.mesh: sizes are positive, and at most one is -1; got {dict(sizes)}")
    if free:
        taken = math.prod(size for size in shape.values() if size != -1)
        shape[free[0]] = len(devices) // taken if len(devices) % taken == 0 else 0
    if math.prod(shape.values()) != len(devices):
        raise ShardingError(
            f"sharding.mesh: {dict(sizes)} does not multiply to the {len(devices)} devices there are; "
            "give one axis -1 to take what the others leave over"
        )
    explicit = (AxisType.Explicit,) * len(MESH_AXES)
    sizes_of_slice, across = over_slices(shape, slices(devices))
    if across is not None:
        with _on_torus(sizes):
            placed = mesh_utils.create_hybrid_device_mesh(sizes_of_slice, across, devices)
        return Mesh(placed, MESH_AXES, axis_types=explicit)
    with _on_torus(sizes):
        return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=explicit, devices=devices)


class OffTorusError(ShardingError):
    """Sizes of a mesh that are not products of the sides of the torus that the devices form."""


@contextlib.contextmanager
def _on_torus(sizes: Mapping[str, int]) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:  # of mesh_utils
        raise OffTorusError(
            f"sharding.mesh: {dict(sizes)} cannot be laid onto the torus that these devices form; name sizes that are each the "
            "product of some of its sides"
        ) from error


def over_slices(shape: Mapping[str, int], number: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(sizes within a slice, sizes over slices): the outermost axes go over the slices; None where there is one slice.

    Raises ShardingError where no outermost axes hold whole slices.
    """
    if number == 1:
        return tuple(shape.values()), None
    left, across, within = number, [], []
    for size in shape.values():
        over = math.gcd(size, left)
        across.append(over)
        within.append(size // over)
        left //= over
    if left > 1:
        raise ShardingError(
            f"sharding.mesh: {number} slices do not divide into {dict(shape)}; give replica or data a multiple of {number}"
        )
    return tuple(within), tuple(across)


def default_mesh(strategy: Strategy, fits: Callable[[Mesh], bool], devices: Devices | None = None) -> Mesh:
    """The mesh for a strategy whose user named no sizes.

    `replica` is the number of slices; of `tensor` or `expert` as much as the model divides into (`fits(mesh)` tells); the rest
    goes to the axes that split weights, as evenly as it divides, or else to `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    used = strategy.mesh_axes
    replicas = slices(devices) if "replica" in used else 1
    model = next((axis for axis in ("tensor", "expert") if axis in used), None)
    shared = [axis for axis in strategy.axes.get("embed", ()) if axis != model] or [a for a in ("data",) if a in used]
    each = len(devices) // replicas
    sizes = [n for n in range(each, 0, -1) if each % n == 0] if model and shared else [each] if model else [1]
    choices = (
        {"replica": replicas, **split, **({model: size} if model else {})}
        for size in sizes
        for split in _splits(each // size, shared)
    )
    meshes = [mesh for mesh in (_if_on_torus(choice, devices) for choice in choices) if mesh is not None]
    return next((mesh for mesh in meshes if fits(mesh)), meshes[0])


def _if_on_torus(sizes: Mapping[str, int], devices: Devices) -> Mesh | None:
    try:
        return make_mesh(sizes, devices)
    except OffTorusError:
        return None


def slices(devices: Devices) -> int:
    """How many slices of a pod these devices are on: what the slow network joins. 1 where the platform has none."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _splits(count: int, axes: Sequence[str]) -> list[dict[str, int]]:
    """All sizes of up to two axes whose product is `count`: those nearest to each other first, the smaller one before."""
    if len(axes) < 2:
        return [dict.fromkeys(axes, count)]
    pairs = [(n, count // n) for n in range(1, count + 1) if count % n == 0]
    return [dict(zip(axes, pair, strict=False)) for pair in sorted(pairs, key=lambda pair: (max(pair), pair[0]))]
