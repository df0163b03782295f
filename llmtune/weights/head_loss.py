"""The door of the loss: log-probabilities of targets under a head, without ever holding [batch, seq, vocab]."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmtune.sharding import parts
from llmtune.weights.doors import Weight, linear
from llmtune.weights.tied import Tied
from llmtune.weights.vocabulary_loss import vocabulary_loss


def head_loss(hidden: jax.Array, w: Weight, targets: jax.Array, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and the log-sum-exp of its logits, both float32 [batch, seq].

    hidden [batch, seq, embed], targets int32 [batch, seq]. Logits exist for about `chunk` tokens of each row at a time:
    [batch, seq, vocab] is never held. The gradient with respect to `hidden` is formed beside the logits, in the forward pass;
    logits are formed again in the backward pass only where the head itself trains.

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
    if pieces == 1:
        return _again(piece, in_scan=False)(hidden, targets)
    size = math.ceil(seq / pieces)
    padding = pieces * size - seq
    h = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, pieces, size, embed).swapaxes(0, 1)
    t = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, pieces, size).swapaxes(0, 1)
    _, out = jax.lax.scan(lambda _, chunk: (None, _again(piece, in_scan=True)(*chunk)), None, (h, t))
    log_probs, totals = (o.swapaxes(0, 1).reshape(batch, pieces * size)[:, :seq] for o in out)
    return log_probs, totals


def _piece_of_head_loss(w: Weight, h: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`head_loss` of one piece. Differentiation sees three parts, of which it follows those that are asked for.

    the logits of a constant h   to the weight
    (h - constant h) * toward    zero in value; d log_probs / d h = W (one_hot - softmax) = toward, already formed
    total of a constant weight   to h, where somebody differentiates the log-sum-exp (z-loss); else it merges with the first
    """
    out_axes = ("batch", "seq", "act_vocab")
    still_h, still_w = jax.lax.stop_gradient((h, w))
    logits = linear(still_h, w, out_axes).astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    hit = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2) == targets[..., None]
    log_probs = jnp.where(hit, logits, 0.0).sum(axis=-1) - total

    error = jax.lax.stop_gradient(hit - jnp.exp(logits - total[..., None])).astype(h.dtype)
    toward = jax.vjp(lambda h: linear(h, still_w, out_axes), still_h)[1](error)[0]
    toward = checkpoint_name(toward, "toward").astype(jnp.float32)
    log_probs += ((h - still_h).astype(jnp.float32) * toward).sum(axis=-1)

    total_of_h = jax.nn.logsumexp(linear(h, still_w, out_axes).astype(jnp.float32), axis=-1)
    return log_probs, total + (total_of_h - jax.lax.stop_gradient(total_of_h))


def _again(piece: Callable, *, in_scan: bool) -> Callable:
    """Keeps the gradient towards h for the backward pass, and nothing of the logits."""
    policy = jax.checkpoint_policies.save_only_these_names("toward")
    return jax.checkpoint(piece, prevent_cse=not in_scan, policy=policy)  # a scan by itself keeps both passes apart
