"""Schedule-free AdamW: an average of the iterates in place of a falling learning rate (Defazio et al. 2024, arXiv:2405.15682).

    y = b1 x + (1 - b1) z          the weights of the state: where gradients are taken
    z <- z - rate (g / (sqrt(v) + eps) + decay y)
    x <- (1 - c) x + c z           c = weight / sum of weights, weight = (largest rate so far)^2

x is what should be evaluated and exported; it follows from y and z (`average_of`) and is not stored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmtune.optimizers.placement import layout_of


class ScheduleFreeState(NamedTuple):
    """`z`: the iterates; `second`: moments; `weight_sum`, `largest_rate` float32 []."""

    count: jax.Array
    z: Any
    second: Any
    weight_sum: jax.Array
    largest_rate: jax.Array


def schedule_free_adamw(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, step_of: Callable[[Any, Any], Any]
) -> optax.GradientTransformation:
    """Updates of y. `step_of(directions, y)`: decay added and per-leaf rates multiplied in, before the learning rate."""

    def init(params: Any) -> ScheduleFreeState:
        zero = jnp.zeros((), jnp.float32)
        z = jax.tree.map(jnp.copy, params)  # arrays of its own, so that both can be given away
        return ScheduleFreeState(jnp.zeros((), jnp.int32), z, jax.tree.map(jnp.zeros_like, params), zero, zero)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.count + 1
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        largest = jnp.maximum(state.largest_rate, rate)
        total = state.weight_sum + largest**2
        share = jnp.where(total > 0, largest**2 / jnp.where(total > 0, total, 1.0), 0.0)

        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, updates)
        correction = 1 - b2 ** count.astype(jnp.float32)
        directions = jax.tree.map(lambda g, v: g / (jnp.sqrt(v / correction) + eps), updates, second)
        steps = step_of(directions, params)
        # y moves with the average, and by its own share of z's step
        updates = jax.tree.map(
            lambda y, z, s: share * (z - y) - rate * (1 - b1 * (1 - share)) * s, params, state.z, steps
        )
        z = jax.tree.map(lambda z, s: z - rate * s, state.z, steps)
        return updates, ScheduleFreeState(count, z, second, total, largest)

    return optax.GradientTransformation(init, update)


def average_of(b1: float, params: Any, opt_state: Any) -> Any:
    """X of y and z."""
    iterates = optax.tree.get(opt_state, "z")
    if not jax.sharding.get_abstract_mesh().empty:  # a strategy may have split them further than the weights
        iterates = jax.tree.map(lambda y, z: jax.sharding.reshard(z, layout_of(y)), params, iterates)
    return jax.tree.map(lambda y, z: (y - (1 - b1) * z) / b1, params, iterates)
