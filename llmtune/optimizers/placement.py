"""Products and blocks of matrices that are spread over devices: XLA places what happens inside, the results lie as they must.

Explicit mesh axes refuse to split a sharded dimension into blocks, or to multiply a matrix by its own transpose, without being
told where each intermediate lies. What an optimizer computes of one leaf ends in arrays whose layouts are known, so that only
these are said.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def layout_of(leaf: jax.Array) -> PartitionSpec:
    """How a leaf is spread over the mesh of the function that is traced."""
    sharding = jax.typeof(leaf).sharding
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def placed(function: Callable[..., Any], layouts: Sequence[PartitionSpec] | PartitionSpec) -> Callable[..., Any]:
    """The function with shardings chosen by XLA inside and its results laid out so; without a mesh, the function."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.sharding.auto_axes(function, out_sharding=layouts)
