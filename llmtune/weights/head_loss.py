"""The door of the loss: log-probabilities of targets under a head, without ever holding [batch, seq, vocab]."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmtune.sharding import parts
from llmtune.weights.doors import Weight, linear
from llmtune.weights.tied import Tied
from llmtune.weights.vocabulary_loss import vocabulary_loss

LOGITS = ("batch", "seq", "act_vocab")  # their logical axes
KEPT = 2**28  # bytes of float32 logits of a whole batch that are kept for the gradient of a head that trains


def head_loss(hidden: jax.Array, w: Weight, targets: jax.Array, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and the log-sum-exp of its logits, both float32 [batch, seq].

    hidden [batch, seq, embed], targets int32 [batch, seq]. Logits exist for about `chunk` tokens of each row at a time:
    [batch, seq, vocab] is never held, unless it is as small as KEPT. The gradient with respect to `hidden` is formed beside the
    logits, in the forward pass; the backward pass asks for logits only where the head itself trains, and forms them again where
    they were not kept.

    Where several devices share one head that is an array, or a tied table, it is cut along the vocabulary instead, which moves
    fewer bytes between them (`weights/vocabulary_loss.py`).
    """
    if parts("batch") * parts("seq") > 1:
        own = w.table if isinstance(w, Tied) else w
        if isinstance(own, jax.Array):
            return vocabulary_loss(hidden, own, targets, chunk=chunk, layout="oi" if isinstance(w, Tied) else "io")
    batch, seq, embed = hidden.shape
    pieces = max(1, math.ceil(seq / chunk))
    piece = functools.partial(_piece_of_head_loss, w)
    vocab = jax.eval_shape(lambda h: linear(h, w, LOGITS), hidden).shape[-1]
    names = ("toward", "logits") if batch * seq * vocab * 4 <= KEPT else ("toward",)
    if pieces == 1:
        return _again(piece, names, in_scan=False)(hidden, targets)
    size = math.ceil(seq / pieces)
    padding = pieces * size - seq
    h = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, pieces, size, embed).swapaxes(0, 1)
    t = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, pieces, size).swapaxes(0, 1)
    _, out = jax.lax.scan(lambda _, chunk: (None, _again(piece, names, in_scan=True)(*chunk)), None, (h, t))
    log_probs, totals = (o.swapaxes(0, 1).reshape(batch, pieces * size)[:, :seq] for o in out)
    return log_probs, totals


def _piece_of_head_loss(w: Weight, h: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`head_loss` of one piece. Differentiation sees three parts, of which it follows those that are asked for.

    the logits of a constant h   to the weight
    (h - constant h) * toward    zero in value; d log_probs / d h = W (one_hot - softmax) = toward, already formed
    total of a constant weight   to h, where somebody differentiates the log-sum-exp (z-loss); else it merges with the first
    """
    still_h, still_w = jax.lax.stop_gradient((h, w))
    logits = checkpoint_name(linear(still_h, w, LOGITS).astype(jnp.float32), "logits")
    total = jax.nn.logsumexp(logits, axis=-1)
    hit = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2) == targets[..., None]
    log_probs = jnp.where(hit, logits, 0.0).sum(axis=-1) - total

    error = jax.lax.stop_gradient(hit - jnp.exp(logits - total[..., None])).astype(h.dtype)
    toward = jax.vjp(lambda h: linear(h, still_w, LOGITS), still_h)[1](error)[0]
    toward = checkpoint_name(toward, "toward").astype(jnp.float32)
    log_probs += ((h - still_h).astype(jnp.float32) * toward).sum(axis=-1)

    total_of_h = jax.nn.logsumexp(linear(h, still_w, LOGITS).astype(jnp.float32), axis=-1)
    return log_probs, total + (total_of_h - jax.lax.stop_gradient(total_of_h))


def _again(piece: Callable, names: Sequence[str], *, in_scan: bool) -> Callable:
    """Keeps what is named for the backward pass: the gradient towards h, and logits or nothing of them."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(piece, prevent_cse=not in_scan, policy=policy)  # a scan by itself keeps both passes apart
