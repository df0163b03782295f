"""The key-value cache: one buffer for all layers, written in place as the scan over layers carries it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.kernels import Mask, attention
from llmtune.models.attention import Attend
from llmtune.models.config import ModelConfig
from llmtune.sharding import spec

CAUSAL = Mask(causal=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """k and v: [layers, batch, length, kv_heads, head_dim]; slot i holds the token of index i of every row."""

    k: jax.Array
    v: jax.Array


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """Zeros, laid out like keys and values."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    layout = spec("layers", "batch", "seq", "act_kv_heads", None)
    zeros = jnp.zeros(shape, dtype, out_sharding=layout)
    return KVCache(zeros, zeros)


def attend_and_fill(segment_ids: jax.Array) -> Attend:
    """Prefill: attention within the prompt's own rows, whose keys and values are written to the front of the cache."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        out = attention(
            q, k, v, mask=CAUSAL, q_segments=segment_ids, kv_segments=segment_ids, scale=q.shape[-1] ** -0.5
        )
        return out, _write(cache, k, v, layer, 0)

    return attend


def attend_to_cache(segment_ids: jax.Array, index: jax.Array) -> Attend:
    """Decoding: one token per row, at `index`, sees what the cache holds up to it. segment_ids int32 [batch, length]."""
    here = jax.lax.dynamic_slice_in_dim(segment_ids, index, 1, axis=1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        cache = _write(cache, k, v, layer, index)
        keys, values = (jax.lax.dynamic_index_in_dim(x, layer, axis=0, keepdims=False) for x in (cache.k, cache.v))
        out = attention(
            q, keys, values,
            mask=CAUSAL, q_segments=here, kv_segments=segment_ids, q_offset=index, scale=q.shape[-1] ** -0.5,
        )  # fmt: skip
        return out, cache

    return attend


def _write(cache: KVCache, k: jax.Array, v: jax.Array, layer: jax.Array, index: jax.Array | int) -> KVCache:
    zero = jnp.zeros((), jnp.int32)
    at = (layer, zero, jnp.asarray(index, jnp.int32), zero, zero)
    put = lambda buffer, new: jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), at)  # noqa: E731
    return KVCache(put(cache.k, k), put(cache.v, v))
