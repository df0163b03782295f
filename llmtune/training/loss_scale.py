"""A dynamic loss scale for float16, whose gradients would vanish below 6e-8 (Micikevicius et al. 2018, arXiv:1710.03740, 3.2).

    gradients of scale * loss, divided by scale in float32
    overflow        the step is skipped, scale / 2 (not below 1)
    `interval` steps without one        scale * 2

as torch.amp.GradScaler has it. The loss is a sum over tokens; it is scaled as if it were their mean over a full batch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmtune.training.guard import is_finite
from llmtune.training.state import Metrics, Revision, TrainState

SMALLEST = 1.0


class LossScale(NamedTuple):
    """`scale` float32 [], `good` int32 []: steps since it last changed."""

    scale: jax.Array
    good: jax.Array


def scaled(sums: Callable[..., tuple[jax.Array, Any]], factor: jax.Array) -> Callable[..., tuple[jax.Array, Any]]:
    """The same sums, the loss times `factor`."""

    def function(*arguments: Any) -> tuple[jax.Array, Any]:
        loss, rest = sums(*arguments)
        return loss * factor, rest

    return function


def scale_loss(initial: float, interval: int) -> Revision:
    """Follows overflows. Metrics tell `loss_scale`, and `overflow`: 1 where a skipped step only means that it was too large."""

    def begin(state: TrainState) -> TrainState:
        return replace(state, loss_scale=LossScale(jnp.float32(initial), jnp.zeros((), jnp.int32)))

    def revise(state: TrainState, proposed: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        scale, good = state.loss_scale
        finite = is_finite(metrics)
        grows = good + 1 >= interval
        grown = LossScale(jnp.where(grows, scale * 2, scale), jnp.where(grows, 0, good + 1))
        halved = LossScale(jnp.maximum(scale / 2, SMALLEST), jnp.zeros_like(good))
        after = jax.tree.map(lambda up, down: jnp.where(finite, up, down), grown, halved)
        overflow = (~finite & (scale > SMALLEST)).astype(jnp.float32)
        return replace(proposed, loss_scale=after), {**metrics, "loss_scale": scale, "overflow": overflow}

    return Revision(begin, revise)
