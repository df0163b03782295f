"""What a run's sections add to its plain step, in the order in which a proposed step passes through.

    regularize.*_start      the weights at the start are kept
    average                 and their average, before a step can be left out
    divergence              spikes are looked for, bad steps left out
    train.dtype: float16    a loss scale
    optimizer.memory: host  the first state's moments go to the host

A loss scale follows overflows that were left out, and so comes last.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from llmtune.config import Run
from llmtune.kernels import draw_attention_dropout
from llmtune.models.config import ModelConfig
from llmtune.objectives.regularized import regularized_loss
from llmtune.optimizers import evaluated_weights
from llmtune.training.average import follow_average, remember_start
from llmtune.training.guard import skip_bad_steps, watch_spikes
from llmtune.training.host_memory import begin_on_host, weight_by_weight
from llmtune.training.loss_scale import scale_loss
from llmtune.training.state import Metrics, Revision, TrainState
from llmtune.training.step import at_once
from llmtune.weights import with_dropout_keys, with_noise


def choose_revisions(run: Run, schedule: optax.Schedule) -> tuple[Revision, ...]:
    """The revisions of a run; none where it asks for nothing."""
    chosen, policy = [], run.divergence
    if run.regularize.l2_start or run.regularize.kl_start:
        chosen.append(remember_start())
    if run.average is not None:
        chosen.append(follow_average(run.average.decay))
    if policy.spikes != "off":
        chosen.append(watch_spikes(policy.window, policy.sigmas))
    if policy.non_finite == "skip":
        chosen.append(skip_bad_steps(schedule, *((_spiked,) if policy.spikes not in ("off", "warn") else ())))
    if run.train.dtype == "float16":
        chosen.append(scale_loss(run.train.loss_scale, run.train.loss_scale_interval))
    if run.optimizer.memory == "host":
        chosen.append(begin_on_host())
    return tuple(chosen)


def choose_update(run: Run) -> Callable[..., tuple[TrainState, Metrics]]:
    """How a step's proposal follows from the optimizer's state: at once, or weight by weight from the host's memory."""
    return weight_by_weight if run.optimizer.memory == "host" else at_once


def choose_weights(run: Run, averaged: bool) -> Callable[[TrainState], Any]:
    """Which weights of a state are evaluated or exported: its own, an optimizer's average, or the moving one if `averaged`."""
    if averaged:
        return lambda state: state.average
    own = evaluated_weights(run.optimizer)
    return lambda state: own(state.trainable, state.opt_state)


def choose_objective(run: Run, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The objective with what `regularize` adds to the loss; the plain one where it adds nothing."""
    terms = {name: getattr(run.regularize, name) for name in ("label_smoothing", "z_loss", "kl_start")}
    return functools.partial(regularized_loss, **terms) if any(terms.values()) else plain


def attention_dropout(run: Run, config: ModelConfig) -> float:
    """The rate of a run: its own, or else that of the model's config.json."""
    own = run.regularize.attention_dropout
    return config.attention_dropout if own is None else own


def choose_perturbation(run: Run, config: ModelConfig) -> Callable[[Any, jax.Array], Any]:
    """What becomes of the weights for a step: dropout of adapters and of attention, and noise on the embeddings."""
    alpha, rate = run.regularize.neftune, attention_dropout(run, config)

    def perturb(params: Any, key: jax.Array) -> Any:
        params = with_dropout_keys(params, key)  # which folds in the paths of weights
        if alpha is not None:
            params = with_noise(params, jax.random.fold_in(key, 1), alpha)
        if rate:
            params = {**params, "attention_dropout": draw_attention_dropout(jax.random.fold_in(key, 2), rate)}
        return params

    return perturb


def _spiked(state: TrainState, metrics: Metrics) -> jax.Array:
    del state
    return metrics["spike"] > 0
