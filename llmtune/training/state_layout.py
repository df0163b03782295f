"""ZeRO stage 1: the optimizer's state split over devices that hold the same weights (Rajbhandari et al. 2020, arXiv:1910.02054).

    gradients, weights  --as `state` says-->  each device updates its part  --as the weights are-->  updates

An optax transformation around any other: inside it, all arrays of a weight's shape are laid out as the strategy's `state` says.
"""

from typing import Any

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from llmtune.sharding import ShardingError, Strategy, axis_size
from llmtune.weights import ArraySpec


def state_layouts(declared: Any, mesh: Mesh, strategy: Strategy) -> Any:
    """A PartitionSpec for each declared array that trains; None where the strategy splits no state.

    Arrays that the state's axes do not divide keep their weight's layout.
    """
    if not strategy.state:
        return None

    def layout(spec: ArraySpec) -> PartitionSpec:
        pieces = spec.pieces or spec.shape
        try:
            split = strategy.state_spec(*spec.axes)
        except ShardingError:  # two axes of it would be split over one mesh axis
            return strategy.spec(*spec.axes)
        divides = all(size % axis_size(mesh, part) == 0 for size, part in zip(pieces, split, strict=True))
        return split if divides else strategy.spec(*spec.axes)

    return jax.tree.map(layout, declared, is_leaf=lambda leaf: isinstance(leaf, ArraySpec))


def with_split_state(optimizer: optax.GradientTransformation, layouts: Any) -> optax.GradientTransformation:
    """The optimizer with its state laid out as `layouts` says; what goes in and comes out is laid out as the weights are."""
    if layouts is None:
        return optimizer

    def split(tree: Any) -> Any:
        return jax.tree.map(jax.sharding.reshard, tree, layouts)

    def init(params: Any) -> Any:
        return optimizer.init(split(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gradients = updates
        updates, state = optimizer.update(split(gradients), state, None if params is None else split(params), **extra)
        whole = jax.tree.map(
            lambda own, like: jax.sharding.reshard(own, jax.typeof(like).sharding.spec), updates, gradients
        )
        return whole, state

    return optax.GradientTransformation(init, update)
