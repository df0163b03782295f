"""Attention in blocks with an online softmax: memory linear in the row's length, invisible blocks skipped.

The pairs of blocks that causality and the window leave visible are a static list; one scan walks it forward, and one walks it
backward, forming the scores anew from the saved log-sum-exp (Dao 2023, arXiv:2307.08691, algorithms 1 and 2). Compile time does
not depend on the length. This is the reference of the platform kernels, and what the CPU runs on long rows.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmtune.kernels.attention_dropout import Dropped, with_dropped
from llmtune.kernels.masks import Mask, no_gradients, tied, visible, visible_blocks

HIDDEN = -1e30
Blocks = jax.Array  # [blocks, batch, kv_heads, groups, block, size], or without groups for keys and values


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    mask: Mask,
    scale: float,
    block: int = 256,
    dropped: Dropped | None = None,
) -> jax.Array:
    """Q [batch, seq, heads, size], k and v [batch, before + seq, kv_heads, size] -> like q. Softmax in float32."""
    batch, seq, heads, size = q.shape
    kv_heads = k.shape[2]
    padded, extra = -(-seq // block) * block, -mask.before % block
    mask = replace(mask, before=mask.before + extra)  # the first query begins a block of keys

    def pad(x: jax.Array) -> jax.Array:
        front = 0 if x is q else extra
        return jnp.pad(x, ((0, 0), (front, padded - seq), *((0, 0),) * (x.ndim - 2)))

    q_blocks = pad(q).reshape(batch, -1, block, kv_heads, heads // kv_heads, size).transpose(1, 0, 3, 4, 2, 5)
    k_blocks, v_blocks = (pad(x).reshape(batch, -1, block, kv_heads, size).transpose(1, 0, 3, 2, 4) for x in (k, v))
    segment_blocks = pad(segments).reshape(batch, -1, block).swapaxes(0, 1)
    dropped = None if dropped is None else dropped.grouped(kv_heads)
    out: Any = _attend(q_blocks, k_blocks, v_blocks, segment_blocks, dropped, mask, scale)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, padded, heads, size)[:, :seq]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: Blocks, k: Blocks, v: Blocks, segments: jax.Array, dropped: Dropped | None, mask: Mask, scale: float
) -> Blocks:
    return _forward(q, k, v, segments, dropped, mask, scale)[0]


def _forward(q, k, v, segments, dropped, mask, scale):
    blocks, *lead, block, _ = q.shape
    out = jnp.zeros(q.shape, jnp.float32)
    peak = jnp.full((blocks, *lead, block), HIDDEN, jnp.float32)
    total = jnp.zeros((blocks, *lead, block), jnp.float32)

    def step(carry, pair):
        out, peak, total = carry
        i, j = pair
        scores, seen = _scores(q, k, documents, i, j, mask, scale)
        new_peak = jnp.maximum(peak[i], scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak[i] - new_peak)
        mixing = with_dropped(weights, words, *_places(i, j, block, mask))
        mixed = _dot("bkgst,bktd->bkgsd", mixing.astype(v.dtype), v[j])
        out = out.at[i].set(out[i] * shrink[..., None] + mixed)
        total = total.at[i].set(total[i] * shrink + weights.sum(-1))
        return (out, peak.at[i].set(new_peak), total), None

    visits = visible_blocks(mask, blocks * block, len(k) * block, block)
    documents, pairs, words = tied((segments, visits, dropped), q)
    (out, peak, total), _ = jax.lax.scan(step, (out, peak, total), tuple(pairs.T))
    empty = total == 0.0
    out = checkpoint_name((out / jnp.where(empty, 1.0, total)[..., None]).astype(q.dtype), "attention")
    log_sum = jnp.where(empty, 0.0, peak + jnp.log(jnp.where(empty, 1.0, total)))
    log_sum = checkpoint_name(log_sum, "attention_log_sum")
    return out, (q, k, v, segments, dropped, out, log_sum)


def _backward(mask, scale, saved, gradient):
    q, k, v, segments, dropped, out, log_sum = saved
    blocks, block = q.shape[0], q.shape[-2]
    shared = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # sum over keys of p * dp, per query
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))

    def step(carry, pair):
        dq, dk, dv = carry
        i, j = pair
        scores, seen = _scores(q, k, documents, i, j, mask, scale)
        weights = jnp.where(seen, jnp.exp(scores - log_sum[i][..., None]), 0.0)
        places = _places(i, j, block, mask)
        dweights = with_dropped(_dot("bkgsd,bktd->bkgst", gradient[i], v[j]), words, *places)
        dscores = weights * (dweights - shared[i][..., None]) * scale
        narrow = dscores.astype(q.dtype)
        dq = dq.at[i].add(_dot("bkgst,bktd->bkgsd", narrow, k[j]))
        dk = dk.at[j].add(_dot("bkgst,bkgsd->bktd", narrow, q[i]))
        mixing = with_dropped(weights, words, *places).astype(v.dtype)
        dv = dv.at[j].add(_dot("bkgst,bkgsd->bktd", mixing, gradient[i]))
        return (dq, dk, dv), None

    visits = visible_blocks(mask, blocks * block, len(k) * block, block)
    documents, pairs, words = tied((segments, visits, dropped), q)
    (dq, dk, dv), _ = jax.lax.scan(step, zeros, tuple(pairs.T))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), *no_gradients(segments, dropped)


_attend.defvjp(_forward, _backward)


def _places(i, j, block, mask):
    """Queries and keys of a pair of blocks, counted from the first query."""
    index = jnp.arange(block)
    return i * block + index, j * block + index - mask.before


def _scores(q, k, segments, i, j, mask, scale):
    """float32 scores [batch, kv_heads, groups, block, block] of one pair of blocks, and which of them are seen."""
    block = q.shape[-2]
    scores = _dot("bkgsd,bktd->bkgst", q[i], k[j]) * scale
    index = jnp.arange(block)
    at = i + mask.before // block  # the queries' block among those of keys
    seen = visible(mask, at * block + index, j * block + index, segments[at], segments[j])[:, None, None]
    return jnp.where(seen, scores, HIDDEN), seen


def _dot(layout: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(layout, x, y, precision=precision, preferred_element_type=jnp.float32)
