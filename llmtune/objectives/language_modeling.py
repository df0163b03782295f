"""Next-token cross-entropy: pre-training and supervised fine-tuning are this one objective on different labels."""

import jax
import jax.numpy as jnp

from llmtune.objectives.record import Batch, Metrics, Model

IGNORED = -100  # the label of a token that is no target


def next_token_loss(model: Model, batch: Batch) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum of -log p(token t+1 | tokens up to t) over target tokens, and their number.

    batch: int32 [batch, seq] `tokens`, `labels` (aligned with tokens; IGNORED where there is no loss), `segment_ids`,
    `positions`. The shift happens here; the first token of a document is never a target.
    """
    losses, weights = next_token_losses(model, batch)
    return losses.sum(), weights.sum(), {}


def next_token_losses(model: Model, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The same before it is summed: (losses, weights), float32 [batch, seq]; both 0 where the next token is no target."""
    targets, weights = shifted_targets(batch["labels"], batch["segment_ids"])
    log_probs, _, _ = model.token_log_probs(batch["tokens"], batch["positions"], batch["segment_ids"], targets)
    return -(weights * log_probs), weights


def shifted_targets(labels: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(targets int32, weights float32): at t, the label of t+1, where it lies in the same document and is a target."""
    following = _shift_left(labels, IGNORED)
    same_document = (_shift_left(segment_ids, 0) == segment_ids) & (segment_ids > 0)
    counted = same_document & (following != IGNORED)
    return jnp.where(counted, following, 0), counted.astype(jnp.float32)


def _shift_left(rows: jax.Array, fill: int) -> jax.Array:
    return jnp.concatenate([rows[:, 1:], jnp.full_like(rows[:, :1], fill)], axis=1)
