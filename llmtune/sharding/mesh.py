"""The device mesh. Its axes are typed explicit: a layout that does not fit is a Python error, on a laptop, at trace time.

A single device is the (1, 1) mesh; there is no code path without a mesh.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from llmtune.sharding.strategy import ShardingError, Strategy

MESH_AXES = ("fsdp", "tensor")
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
    return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=explicit, devices=devices)


def default_mesh(strategy: Strategy, fits: Callable[[Mesh], bool], devices: Devices | None = None) -> Mesh:
    """The mesh for a strategy whose user named no sizes: as much of the tensor axis as the model divides into, rest fsdp.

    `fits(mesh)` tells whether the model's weights divide over a mesh; strategies without a tensor axis take all as fsdp.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    uses_tensor = any("tensor" in part for part in strategy.axes.values())
    tensor_sizes = [n for n in range(count, 0, -1) if count % n == 0] if uses_tensor else [1]
    meshes = [make_mesh({"fsdp": count // n, "tensor": n}, devices) for n in tensor_sizes]
    return next((mesh for mesh in meshes if fits(mesh)), meshes[0])
