"""Copies of the weights that train: their moving average, and where they began.

    average <- d average + (1 - d) weights,   d = min(decay, (1 + step) / (10 + step))

so that the first steps do not weigh the beginning too much (as TensorFlow's ExponentialMovingAverage has it). Both are parts of
the state: saved, laid out like the weights, and no step is given them away.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.training.state import Metrics, Revision, TrainState


def follow_average(decay: float) -> Revision:
    """Keeps the average. A step that is left out afterwards leaves it as it was."""

    def begin(state: TrainState) -> TrainState:
        return replace(state, average=jax.tree.map(_copied, state.trainable))

    def revise(state: TrainState, proposed: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        step = state.step.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + step) / (10 + step))
        mixed = jax.tree.map(
            lambda own, new: (d * own + (1 - d) * new).astype(own.dtype), state.average, proposed.trainable
        )
        return replace(proposed, average=mixed), metrics

    return Revision(begin, revise)


def _copied(weights: jax.Array) -> jax.Array:
    """In float32, whatever the weights are: an average moves by less than bfloat16 can hold."""
    return weights.astype(jnp.float32) if weights.dtype == jnp.bfloat16 else jnp.copy(weights)


def remember_start() -> Revision:
    """Keeps the weights that the run began with."""
    return Revision(
        lambda state: replace(state, start=jax.tree.map(jnp.copy, state.trainable)),
        lambda state, proposed, metrics: (proposed, metrics),
    )


def half_squared_distance(trainable: Any, start: Any) -> jax.Array:
    """Of two trees: what L2-SP adds to the loss (Li et al. 2018, arXiv:1802.01483, equation 4)."""
    squares = jax.tree.map(lambda own, then: jnp.square(own - then).sum(), trainable, start)
    return 0.5 * sum(jax.tree.leaves(squares), jnp.zeros(()))
