"""Attention of one new token per row against a cache that holds keys and values the way a product reads them.

    q [batch, 1, heads, size]     keys [batch, kv_heads, size, length]     values [batch, kv_heads, length, size]

Both products run over the cache as it lies, with no transposed copy of it: on a CPU that copy would cost more than the products.
"""

import jax
import jax.numpy as jnp

from llmtune.kernels.attention import on_each_device

HIDDEN = -1e30


def cached_attention(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, *, scale: float) -> jax.Array:
    """Softmax(scale * q k^T) v over the places of the cache where `seen` (bool [batch, length]) is true; like q."""
    return on_each_device(lambda *arrays: _attend(*arrays, scale=scale), q, keys, values, seen)


def _attend(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, *, scale: float) -> jax.Array:
    batch, _, heads, size = q.shape
    kv_heads = keys.shape[1]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, size)
    scores = jnp.matmul(grouped, keys, precision=precision, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, HIDDEN), axis=-1).astype(values.dtype)
    out = jnp.matmul(weights, values, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(batch, 1, heads, size).astype(q.dtype)
