"""Next-token cross-entropy with what keeps a model from overfitting and forgetting, from logits a piece at a time.

    (1 - s) nll + s (mean over the vocabulary of -log p)    label smoothing     Szegedy et al. 2016, arXiv:1512.00567, section 7
    + z (log-sum-exp)^2                                     z-loss              Chowdhery et al. 2022, arXiv:2204.02311, section 5
    + k KL(start || model)                                  kl_start            Hinton et al. 2015, arXiv:1503.02531, at T = 1

each for every target. Logits are formed again in the backward pass: [batch, seq, vocab] is never held, and of the starting model
only hidden states are.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmtune.objectives.language_modeling import shifted_targets, sums_by_source
from llmtune.objectives.record import Batch, Metrics, Model

Pieces = dict[str, jax.Array]


def regularized_loss(
    model: Model,
    batch: Batch,
    sources: int = 1,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    kl_start: float = 0.0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """`next_token_loss` with these terms; `cross_entropy` and each term, unweighted, are among the metrics."""
    rows = (batch["tokens"], batch["positions"], batch["segment_ids"])
    targets, weights = shifted_targets(batch["labels"], batch["segment_ids"])
    hidden, aux = model.hidden(*rows)
    inputs = [hidden, targets]
    start = model.reference if kl_start else None
    if start is not None:
        inputs.append(jax.lax.stop_gradient(start.hidden(*rows)[0]))

    def piece(hidden: jax.Array, targets: jax.Array, *before: jax.Array) -> Pieces:
        logits = model.head_logits(hidden)
        total = jax.nn.logsumexp(logits, axis=-1)
        hit = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2) == targets[..., None]
        own = {"cross_entropy": total - jnp.where(hit, logits, 0.0).sum(-1)}
        if label_smoothing:
            own["smoothing"] = total - logits.mean(-1)
        if z_loss:
            own["z_loss"] = jnp.square(total)
        if start is not None:
            then = jax.lax.stop_gradient(start.head_logits(before[0]))
            then = then - jax.nn.logsumexp(then, axis=-1, keepdims=True)
            own["kl_start"] = (jnp.exp(then) * (then - (logits - total[..., None]))).sum(-1)
        return own

    terms = by_pieces(piece, model.head_chunk, *inputs)
    sums = {name: (weights * own).sum() for name, own in terms.items()}
    own = sums_by_source(batch, sources, source_losses=weights * terms["cross_entropy"], source_targets=weights)
    weight = weights.sum()
    loss = (1 - label_smoothing) * sums["cross_entropy"]
    for name, share in (("smoothing", label_smoothing), ("z_loss", z_loss), ("kl_start", kl_start)):
        loss += share * sums[name] if name in sums else 0.0
    sums.pop("smoothing", None)
    figures = {name: weight * value for name, value in aux.items() if name != "penalty"}
    return loss + weight * aux.get("penalty", 0.0), weight, {**sums, **figures, **own}


def by_pieces(function: Callable[..., Pieces], chunk: int, *rows: jax.Array) -> Pieces:
    """The function of arrays [batch, seq, ...], about `chunk` tokens of each row at a time; its results are [batch, seq]."""
    batch, seq = rows[0].shape[:2]
    pieces = max(1, math.ceil(seq / chunk))
    again = jax.checkpoint(function, prevent_cse=pieces == 1)
    if pieces == 1:
        return again(*rows)
    size = math.ceil(seq / pieces)

    def split(row: jax.Array) -> jax.Array:
        row = jnp.pad(row, ((0, 0), (0, pieces * size - seq), *((0, 0),) * (row.ndim - 2)))
        return row.reshape(batch, pieces, size, *row.shape[2:]).swapaxes(0, 1)

    _, out = jax.lax.scan(lambda _, piece: (None, again(*piece)), None, tuple(split(row) for row in rows))
    return jax.tree.map(lambda own: own.swapaxes(0, 1).reshape(batch, pieces * size)[:, :seq], out)
