"""From logical axes to shardings: one NamedSharding per array of a tree, checked against the shapes it must divide."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llmtune.sharding.strategy import ShardingError, Strategy, spec


def sharding_for(
    shape: Sequence[int], logical: Sequence[str | None], mesh: Mesh, strategy: Strategy, *, name: str
) -> NamedSharding:
    """The sharding of one array. `name` is its path, for the error that says which axis does not divide."""
    layout = strategy.spec(*logical)
    for size, axis, part in zip(shape, logical, layout, strict=True):
        ways = axis_size(mesh, part)
        if size % ways:
            raise ShardingError(
                f"{name}: axis {axis!r} of size {size} cannot be split {ways} ways over the mesh axis {part!r} "
                f"(strategy {strategy.name}); sizes that divide it: {_divisors(size, mesh.size)}"
            )
    return NamedSharding(mesh, layout)


def axis_size(mesh: Mesh | AbstractMesh, part: str | tuple[str, ...] | None) -> int:
    """Into how many pieces a dimension with this entry of a PartitionSpec is split."""
    names = (part,) if isinstance(part, str) else (part or ())
    return math.prod(mesh.shape[name] for name in names)


def parts(axis: str) -> int:
    """Into how many pieces the current strategy splits a logical axis on the mesh of the function that is traced."""
    mesh, part = jax.sharding.get_abstract_mesh(), spec(axis)[0]
    return 1 if part is None else axis_size(mesh, part)


def on_own_part() -> bool:
    """Whether what is traced sees plain arrays, those of one device: without a mesh, or inside of `shard_map`."""
    return all(kind == AxisType.Manual for kind in jax.sharding.get_abstract_mesh().axis_types)


def placed_by_compiler(function: Callable, *out_axes: str | None) -> Callable[..., jax.Array]:
    """The function with shardings chosen by XLA inside, its result laid out as `out_axes` say.

    For what explicit axes refuse: gathers with two sharded operands, sorting along a sharded axis, and the like. All traced
    values must be arguments; none may be closed over.
    """
    if on_own_part():
        return function
    return jax.sharding.auto_axes(function, out_sharding=spec(*out_axes))  # type: ignore[return-value]


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Place a host array onto the mesh. With several processes each passes the same whole array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _divisors(size: int, limit: int) -> str:
    return ", ".join(str(n) for n in range(1, limit + 1) if size % n == 0)
