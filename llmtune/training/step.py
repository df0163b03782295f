"""The train step: one pure function for every objective, transform and strategy.

    (state, frozen, batch)  -->  (state, metrics)

The loss is a sum over target tokens divided by their number over the whole global batch. Microbatches therefore add up sums of
loss, of weight and of gradient, and divide once at the end: uneven token counts change nothing.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llmtune.objectives.record import Batch, Model, Objective, TokenLosses
from llmtune.optimizers import widened
from llmtune.sharding import Strategy, spec
from llmtune.training.average import half_squared_distance
from llmtune.training.loss_scale import scaled
from llmtune.training.norms import norms_by_part
from llmtune.training.state import Metrics, Revision, TrainState
from llmtune.transforms import combine
from llmtune.weights import with_dropout_keys

Bind = Callable[[Any], Model]  # a tree of weights -> the record that objectives see
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, Batch, Any], tuple[jax.Array, jax.Array]]


def at_once(
    propose: Callable[[Any], tuple[TrainState, Metrics]], opt_state: Any, gradients: Any
) -> tuple[TrainState, Metrics]:
    """All weights in one go, their optimizer's state being there."""
    del gradients
    return propose(opt_state)


def make_train_step(
    bind: Bind,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    strategy: Strategy,
    microbatches: int,
    seed: int = 0,
    revisions: Sequence[Revision] = (),
    perturb: Callable[[Any, jax.Array], Any] = with_dropout_keys,
    l2_start: float = 0.0,
    update: Callable[..., tuple[TrainState, Metrics]] = at_once,
) -> TrainStep:
    """Metrics, scalars: `loss`, `grad_norm` (before clipping; also by part), `learning_rate`, `tokens`, `target_tokens`.

    `revisions` see what a step proposes, in their order, before it counts; without any the step is the plain one. `perturb`: what
    becomes of the weights for one step, by a key: dropout. Where the state keeps its start, the objective sees that model as
    `reference`, and `l2_start` times half the squared distance from it is added to the mean loss. `update`: how what a
    step proposes follows from the optimizer's state as it waits, once there are gradients.

    And the objective's own, such as `cross_entropy` and `aux_loss` of a mixture of experts. `tokens` are without padding. What
    dropout drops follows from (seed, step, microbatch, weight).
    """

    sums = loss_sums(bind, objective, perturb, l2_start)

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        with strategy.active():
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            scale = None if state.loss_scale is None else state.loss_scale.scale / batch["tokens"].size
            own = functools.partial(sums, state.start)
            gradient = jax.value_and_grad(own if scale is None else scaled(own, scale), has_aux=True)
            (loss, (weight, figures)), grads = accumulate(
                gradient, microbatches, widened(state.trainable), frozen, key, batch
            )
            total = jnp.maximum(weight, 1.0)
            if scale is None:
                grads = jax.tree.map(lambda g: g / total, grads)
            else:
                loss, grads = loss / scale, jax.tree.map(lambda g: g / (total * scale), grads)
            measured = {
                "loss": loss / total,
                "grad_norm": optax.tree.norm(grads),
                **norms_by_part(grads),
                "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
                "tokens": (batch["segment_ids"] > 0).sum(),
                "target_tokens": weight,
                **{name: value / total for name, value in figures.items()},
            }

            def propose(opt_state: Any) -> tuple[TrainState, Metrics]:
                before, metrics = replace(state, opt_state=opt_state), measured
                updates, opt_state = optimizer.update(grads, opt_state, state.trainable)
                trainable = optax.apply_updates(state.trainable, updates)
                proposed = replace(state, step=state.step + 1, trainable=trainable, opt_state=opt_state)
                for revision in revisions:
                    proposed, metrics = revision.revise(before, proposed, metrics)
                return proposed, metrics

            return update(propose, state.opt_state, grads)

    return step


def loss_sums(bind: Bind, objective: Objective, perturb: Callable[[Any, jax.Array], Any], l2_start: float) -> Callable:
    """(start, trainable, frozen, key, batch) -> (sum of loss, (sum of weight, sums of figures)), of one microbatch."""

    def sums(
        start: Any, trainable: Any, frozen: Any, key: jax.Array, batch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        model = bind(perturb(combine(trainable, frozen), key))
        if start is None:
            loss, weight, figures = objective(model, batch)
            return loss, (weight, figures)
        loss, weight, figures = objective(with_reference(model, bind(combine(start, frozen))), batch)
        distance = weight * half_squared_distance(trainable, start)  # divided by the weight of all, it counts once
        return loss + l2_start * distance, (weight, {**figures, "l2_start": distance})

    return sums


def with_reference(model: Any, reference: Any) -> Any:
    """The record, with another to compare it with."""
    return replace(model, reference=reference)


def make_eval_step(bind: Bind, token_losses: TokenLosses, strategy: Strategy) -> EvalStep:
    """(trainable, frozen, batch, documents) -> (loss sums, weight sums), float32 [batch, documents] on every device.

    `documents`: 1..K, the segments of a row that are summed, each by itself: what a confidence interval draws from.
    """

    def step(trainable: Any, frozen: Any, batch: Batch, documents: jax.Array) -> tuple[jax.Array, jax.Array]:
        with strategy.active():
            per_token = token_losses(bind(combine(trainable, frozen)), batch)
        sums = (document_sums(values, batch["segment_ids"], documents) for values in per_token)
        loss, weight = (jax.sharding.reshard(own, PartitionSpec()) for own in sums)
        return loss, weight

    return step


def document_sums(values: jax.Array, segment_ids: jax.Array, documents: jax.Array) -> jax.Array:
    """[batch, seq] and the segment of each place -> [batch, documents]; a compare and a sum, which XLA fuses."""
    own = segment_ids[:, None, :] == documents[None, :, None]
    return jnp.where(own, values[:, None, :], 0.0).sum(-1)


def accumulate(
    gradient: Callable, microbatches: int, trainable: Any, frozen: Any, key: jax.Array, batch: Batch
) -> tuple[Any, Any]:
    """((loss sum, (weight sum, sums of metrics)), gradient of the loss sum) over `microbatches` pieces of the batch's rows."""
    if microbatches == 1:
        return gradient(trainable, frozen, key, batch)
    pieces = jax.tree.map(lambda rows: split_rows(rows, microbatches), batch)
    keys = jax.random.split(key, microbatches)

    def add(total: Any, piece: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, frozen, *piece)), None

    first, rest = (jax.tree.map(lambda p, s=s: p[s], (keys, pieces)) for s in (0, slice(1, None)))
    total, _ = jax.lax.scan(add, gradient(trainable, frozen, *first), rest)
    return total


def split_rows(rows: jax.Array, pieces: int) -> jax.Array:
    """[B, S] -> [pieces, B / pieces, S], each piece spread over the devices like the whole (rows are interleaved)."""
    batch, seq = rows.shape
    split = jnp.reshape(rows, (batch // pieces, pieces, seq), out_sharding=spec("batch", None, "seq"))
    return split.swapaxes(0, 1)
