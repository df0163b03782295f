"""Next-token cross-entropy: pre-training and supervised fine-tuning are this one objective on different labels."""

import jax
import jax.numpy as jnp

from llmtune.objectives.record import Batch, Metrics, Model
from llmtune.sharding import parts, placed_by_compiler

IGNORED = -100  # the label of a token that is no target


def next_token_loss(model: Model, batch: Batch, sources: int = 1) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum of -log p(token t+1 | tokens up to t) over target tokens, and their number.

    batch: int32 [batch, seq] `tokens`, `labels` (aligned with tokens; IGNORED where there is no loss), `segment_ids`,
    `positions`. The shift happens here; the first token of a document is never a target. What a mixture of experts adds to
    the mean loss counts once for every target; then the metrics hold `cross_entropy` and its parts.

    Of a mixture of several `sources` the batch says which a token is of, `source_ids`; then the metrics hold the sums of each,
    `source_losses` and `source_targets`, float32 [sources].
    """
    losses, weights, aux = _losses(model, batch)
    cross_entropy, weight = losses.sum(), weights.sum()
    own = sums_by_source(batch, sources, source_losses=losses, source_targets=weights)
    if not aux:
        return cross_entropy, weight, own
    figures = {name: weight * value for name, value in aux.items() if name != "penalty"}
    return cross_entropy + weight * aux["penalty"], weight, {"cross_entropy": cross_entropy, **figures, **own}


def sums_by_source(batch: Batch, sources: int, **values: jax.Array) -> Metrics:
    """Of each of the `values` [batch, seq], its sum over the tokens of every source: float32 [sources]; {} of a single one."""
    if sources == 1:
        return {}
    own = [batch["source_ids"] == source for source in range(sources)]
    return {name: jnp.stack([jnp.where(place, value, 0.0).sum() for place in own]) for name, value in values.items()}


def next_token_losses(model: Model, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy before it is summed: (losses, weights), float32 [batch, seq]; 0 where the next token is no target."""
    losses, weights, _ = _losses(model, batch)
    return losses, weights


def _losses(model: Model, batch: Batch) -> tuple[jax.Array, jax.Array, Metrics]:
    targets, weights = shifted_targets(batch["labels"], batch["segment_ids"])
    log_probs, _, aux = model.token_log_probs(batch["tokens"], batch["positions"], batch["segment_ids"], targets)
    return -(weights * log_probs), weights, aux


def shifted_targets(labels: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(targets int32, weights float32): at t, the label of t+1, where it lies in the same document and is a target."""
    following = _shift_left(labels, IGNORED)
    same_document = (_shift_left(segment_ids, 0) == segment_ids) & (segment_ids > 0)
    counted = same_document & (following != IGNORED)
    return jnp.where(counted, following, 0), counted.astype(jnp.float32)


def _shift_left(rows: jax.Array, fill: int) -> jax.Array:
    def shift(rows: jax.Array) -> jax.Array:
        return jnp.concatenate([rows[:, 1:], jnp.full_like(rows[:, :1], fill)], axis=1)

    return shift(rows) if parts("seq") == 1 else placed_by_compiler(shift, "batch", "seq")(rows)
