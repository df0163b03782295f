"""From the `optimizer` section of a run to an optax transformation and its learning-rate schedule.

AdamW is torch's: bias-corrected moments, eps outside the root, decay decoupled and multiplied by the learning rate. Decay goes
by path, never by number of dimensions: stacked norms are matrices to `ndim`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from llmtune.config import Optimizer
from llmtune.weights import path_name


def make_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Update i (from 0) uses schedule(i).

    Linear warmup from 0 over `warmup_steps`, then constant, linear or cosine to `final_fraction` of the peak at `steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_fraction, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
    }
    decay = decays[config.schedule]()
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(
    config: Optimizer, schedule: optax.Schedule, rates: Callable[[str], float] = lambda path: 1.0
) -> optax.GradientTransformation:
    """Clipping by global norm (where asked for), then AdamW; `rates`: a leaf's path -> its learning rate, in that of all."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=DECAY_MASKS[config.decay],
    )
    return optax.chain(clip, adamw, scale_by_path(rates))


def scale_by_path(rates: Callable[[str], float]) -> optax.GradientTransformation:
    """Each leaf's update times the rate of its path (LoRA+: Hayou et al. 2024, arXiv:2402.12354, trains b faster than a)."""

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        rate = rates(path_name(path))
        return update if rate == 1 else update * rate

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def decay_all(params: Any) -> Any:
    """Every trainable leaf decays, as in torch.optim.AdamW without parameter groups."""
    return jax.tree.map(lambda _: True, params)


def decay_matrices(params: Any) -> Any:
    """Norms' weights do not decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path_name(path), params)


DECAY_MASKS = {"all": decay_all, "matrices": decay_matrices}
