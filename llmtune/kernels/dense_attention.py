"""Attention with the whole score matrix of a row in view: for short rows, and for decoding one token against a cache."""

import jax
import jax.numpy as jnp

from llmtune.kernels.masks import Mask, visible

HIDDEN = -1e30  # a score that no softmax sees, without the NaN that -inf gives a row that sees nothing


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    *,
    mask: Mask,
    scale: float,
    q_offset: jax.Array | int = 0,
) -> jax.Array:
    """Q [batch, q, heads, size], k and v [batch, kv, kv_heads, size] -> like q. Softmax in float32.

    Queries of one key head are stacked into the rows of a single matmul, so grouped keys are never repeated.
    """
    batch, seq, heads, size = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    rows = q.reshape(batch, seq, kv_heads, groups, size).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bkrd,btkd->bkrt", rows, k, precision=precision, preferred_element_type=jnp.float32)
    seen = visible(mask, jnp.arange(seq) + q_offset, jnp.arange(k.shape[1]), q_segments, kv_segments)
    scores = scores.reshape(batch, kv_heads, groups, seq, -1) * scale
    scores = jnp.where(seen[:, None, None], scores, HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(seen.any(-1)[:, None, None, :, None], weights, 0.0).astype(v.dtype)
    out = jnp.einsum(
        "bkrt,btkd->bkrd",
        weights.reshape(batch, kv_heads, groups * seq, -1),
        v,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    out = out.reshape(batch, kv_heads, groups, seq, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, seq, heads, size).astype(q.dtype)
