"""The learning rate over time: update i, counted from 0, uses schedule(i).

    0 --linear--> peak over `warmup_steps`, then

    constant       peak
    linear         in a line to the floor at `steps`
    cosine         in half a wave to the floor at `steps`                         Loshchilov and Hutter 2017, arXiv:1608.03983
    wsd            peak, then in a line to the floor over the last `decay_fraction` of all steps    Hu et al. 2024, 2404.06395
    polynomial     floor + (peak - floor) (1 - progress)^power
    inverse_sqrt   peak sqrt(warmup / i), not below the floor                     Vaswani et al. 2017, arXiv:1706.03762

The floor is `final_fraction` of the peak.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmtune.config import Optimizer


def make_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """The schedule of a run of so many steps: int32 [] -> float32 []."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = SCHEDULES[config.schedule](config, steps, max(steps - warmup, 1))
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def _constant(config: Optimizer, steps: int, rest: int) -> optax.Schedule:
    del steps, rest
    return optax.constant_schedule(config.learning_rate)


def _linear(config: Optimizer, steps: int, rest: int) -> optax.Schedule:
    del steps
    return optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_fraction, rest)


def _cosine(config: Optimizer, steps: int, rest: int) -> optax.Schedule:
    del steps
    return optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.final_fraction)


def _wsd(config: Optimizer, steps: int, rest: int) -> optax.Schedule:
    peak, down = config.learning_rate, max(1, min(rest, round(steps * config.decay_fraction)))
    stable = [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * config.final_fraction, down)]
    return optax.join_schedules(stable, [rest - down])


def _polynomial(config: Optimizer, steps: int, rest: int) -> optax.Schedule:
    del steps
    peak = config.learning_rate
    return optax.polynomial_schedule(peak, peak * config.final_fraction, config.power, rest)


def _inverse_sqrt(config: Optimizer, steps: int, rest: int) -> optax.Schedule:
    del steps, rest
    peak, warmup = config.learning_rate, max(config.warmup_steps, 1)

    def schedule(count: Any) -> jax.Array:
        return peak * jnp.maximum(jnp.sqrt(warmup / (count + warmup)), config.final_fraction)  # counted after warmup

    return schedule


SCHEDULES: dict[str, Callable[[Optimizer, int, int], optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
}
