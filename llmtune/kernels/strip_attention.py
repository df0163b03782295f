"""Attention in strips of queries: for rows that are not long, the whole softmax of a strip is in view.

    queries   strip 0 | strip 1 | strip 2 | ...         few, so they are written out rather than looped over
    keys      [0, s)    [0, 2s)   [0, 3s)               what causality (and a window) leaves visible, a static slice

Nothing beyond the diagonal is computed, and the scores of a strip stay in cache: on a CPU that is twice as fast as one score
matrix per head (batch 8, 256 tokens, 6 heads of 64). The backward pass forms the scores anew from the saved log-sum-exp, so
that a scan over layers keeps nothing of their size.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmtune.kernels.attention_dropout import Dropped, with_dropped
from llmtune.kernels.masks import Mask, no_gradients, visible

HIDDEN = -1e30
STRIPS, NARROWEST = 8, 64  # at most so many strips, of at least so many queries


def strip_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    mask: Mask,
    scale: float,
    dropped: Dropped | None = None,
) -> jax.Array:
    """Q [batch, seq, heads, size], k and v [batch, before + seq, kv_heads, size] -> like q. Softmax in float32."""
    batch, seq, heads, size = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, seq, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    dropped = None if dropped is None else dropped.grouped(kv_heads)
    out: Any = _attend(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), segments, dropped, mask, scale)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, size)


def strips(mask: Mask, seq: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys they may see) of each strip."""
    width = max(NARROWEST, -(-seq // STRIPS))
    for start in range(0, seq, width):
        end = min(start + width, seq)
        first = 0 if mask.window is None else max(0, mask.before + start - mask.window + 1)
        yield slice(start, end), slice(first, mask.before + (end if mask.causal else seq))


# q [batch, kv_heads, groups, seq, size], k and v [batch, kv_heads, seq, size]
@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dropped: Dropped | None, mask: Mask, scale: float
) -> jax.Array:
    return _forward(q, k, v, segments, dropped, mask, scale)[0]


def _forward(q, k, v, segments, dropped, mask, scale):
    outs, log_sums = [], []
    for rows, keys in strips(mask, q.shape[3]):
        scores = _scores(q, k, segments, rows, keys, mask, scale)
        peak = jnp.maximum(scores.max(-1, keepdims=True), HIDDEN / 2)  # of a query that sees nothing: weights 0
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        seen = total > 0
        mixing = with_dropped(weights, dropped, *_places(rows, keys, mask))
        mixed = _dot("bkrt,bktd->bkrd", _flat(mixing).astype(v.dtype), v[:, :, keys]).reshape(*peak.shape[:4], -1)
        outs.append((mixed / jnp.where(seen, total, 1.0)).astype(q.dtype))
        log_sums.append(jnp.where(seen, peak + jnp.log(total), 0.0)[..., 0])
    out = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), "attention_log_sum")
    return out, (q, k, v, segments, dropped, out, log_sum)


def _backward(mask, scale, saved, gradient):
    q, k, v, segments, dropped, out, log_sum = saved
    shared = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # sum over keys of p * dp, per query
    dq = []
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for rows, keys in strips(mask, q.shape[3]):
        scores = _scores(q, k, segments, rows, keys, mask, scale)
        above, queries = _flat(gradient[:, :, :, rows]), _flat(q[:, :, :, rows])
        weights = jnp.exp(scores - log_sum[:, :, :, rows, None])
        places = _places(rows, keys, mask)
        dweights = with_dropped(_dot("bkrd,bktd->bkrt", above, v[:, :, keys]).reshape(scores.shape), dropped, *places)
        dscores = _flat(weights * (dweights - shared[:, :, :, rows, None]) * scale).astype(q.dtype)
        dq.append(_dot("bkrt,bktd->bkrd", dscores, k[:, :, keys]).reshape(*scores.shape[:4], -1))
        dk = dk.at[:, :, keys].add(_dot("bkrt,bkrd->bktd", dscores, queries))
        mixing = _flat(with_dropped(weights, dropped, *places)).astype(v.dtype)
        dv = dv.at[:, :, keys].add(_dot("bkrt,bkrd->bktd", mixing, above))
    return (
        jnp.concatenate(dq, axis=3).astype(q.dtype),
        dk.astype(k.dtype),
        dv.astype(v.dtype),
        *no_gradients(segments, dropped),
    )


_attend.defvjp(_forward, _backward)


def _places(rows: slice, keys: slice, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Queries and keys of a strip, counted from the first query."""
    return jnp.arange(rows.start, rows.stop), jnp.arange(keys.start, keys.stop) - mask.before


def _scores(q, k, segments, rows: slice, keys: slice, mask: Mask, scale: float) -> jax.Array:
    """float32 [batch, kv_heads, groups, rows, keys], HIDDEN where the mask hides."""
    queries, index = q[:, :, :, rows], jnp.arange(k.shape[2])
    scores = _dot("bkrd,bktd->bkrt", _flat(queries), k[:, :, keys]).reshape(*queries.shape[:4], -1) * scale
    own = slice(mask.before + rows.start, mask.before + rows.stop)  # the queries' places among the keys
    seen = visible(mask, index[own], index[keys], segments[:, own], segments[:, keys])
    return jnp.where(seen[:, None, None], scores, HIDDEN)


def _flat(x: jax.Array) -> jax.Array:
    """[batch, kv_heads, groups, rows, n] -> [batch, kv_heads, groups * rows, n]: one matmul for all queries of a key head."""
    batch, kv_heads, groups, rows, n = x.shape
    return x.reshape(batch, kv_heads, groups * rows, n)


def _dot(layout: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(layout, x, y, precision=precision, preferred_element_type=jnp.float32)
