"""Bad steps are not taken: where the loss or the gradient is no number, or far beyond the usual, all stays as it was.

    proposed state  --good-->  proposed state
                    --bad--->  state before, one batch further       weights, moments, schedule and windows untouched

Decided inside the jitted step from two numbers that all devices share, so that it costs no synchronisation and no memory. The
batch counts as seen: the run goes on with the next one. Usual is what lies within `sigmas` standard deviations of the mean of the
last good steps (as OLMo-core judges); norms are compared by their logarithms, which spread evenly.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmtune.optimizers import updates_done
from llmtune.training.state import Metrics, Revision, TrainState

SMALLEST_SPREAD = 1e-3  # of a window that does not move at all


class Recent(NamedTuple):
    """`figures` float32 [2, window]: losses and logarithms of gradient norms, newest last; `count` int32 []: how many ever."""

    figures: jax.Array
    count: jax.Array


def is_finite(metrics: Metrics) -> jax.Array:
    """Whether loss and gradient are numbers: a norm over all leaves of all devices shows any that is not."""
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])


def skip_bad_steps(
    schedule: optax.Schedule,
    is_bad: Callable[[TrainState, Metrics], jax.Array] = lambda state, metrics: jnp.array(False),
) -> Revision:
    """Leaves out steps that are not finite, and those that `is_bad`; metrics tell `skipped`, 0 or 1.

    `learning_rate` is then that of the updates that were done, which the schedule counts.
    """

    def revise(state: TrainState, proposed: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        good = is_finite(metrics) & ~is_bad(state, metrics)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), proposed, state)
        rate = jnp.asarray(schedule(updates_done(state.opt_state)), jnp.float32)
        figures = {**metrics, "learning_rate": rate, "skipped": (~good).astype(jnp.float32)}
        return replace(kept, step=proposed.step), figures

    return Revision(lambda state: state, revise)


def watch_spikes(window: int, sigmas: float) -> Revision:
    """Remembers the last losses and gradient norms; metrics tell `spike`, 0 or 1. Half a window must be full to judge."""

    def begin(state: TrainState) -> TrainState:
        return replace(state, recent=Recent(jnp.zeros((2, window), jnp.float32), jnp.zeros((), jnp.int32)))

    def revise(state: TrainState, proposed: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        recent, own = state.recent, _figures(metrics)
        finite = jnp.isfinite(own).all()
        pushed = jnp.concatenate([recent.figures[:, 1:], own[:, None]], axis=1)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), Recent(pushed, recent.count + 1), recent)
        spike = is_spike(recent, own, sigmas)
        return replace(proposed, recent=kept), {**metrics, "spike": spike.astype(jnp.float32)}

    return Revision(begin, revise)


def is_spike(recent: Recent, figures: jax.Array, sigmas: float) -> jax.Array:
    """Whether loss or norm lies more than `sigmas` standard deviations above the mean of the window, where it holds enough."""
    window = recent.figures.shape[1]
    held = jnp.arange(window) >= window - recent.count
    number = jnp.maximum(held.sum(), 1)
    mean = jnp.where(held, recent.figures, 0.0).sum(1) / number
    spread = jnp.sqrt(jnp.where(held, jnp.square(recent.figures - mean[:, None]), 0.0).sum(1) / number)
    beyond = figures > mean + sigmas * jnp.maximum(spread, SMALLEST_SPREAD)
    return beyond.any() & (recent.count >= window // 2)


def _figures(metrics: Metrics) -> jax.Array:
    return jnp.stack([metrics["loss"], jnp.log(metrics["grad_norm"] + 1e-12)]).astype(jnp.float32)
