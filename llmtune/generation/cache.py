"""The key-value cache, written in place as the scan over layers carries it: one buffer for each slot of the layers' pattern.

Where all layers are alike there is one slot. Layers with a window keep only as many tokens as it is wide, in a ring: index i
lies at i mod window. Windows go by index in the row, and the ring holds the last indices whatever padding a row begins with.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.kernels import Mask, attention
from llmtune.models.attention import Attend, Layer
from llmtune.models.config import ModelConfig
from llmtune.sharding import spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """For each slot, k and v: [layers of the slot, batch, length or window, kv_heads, head_dim]."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """Zeros, laid out like keys and values."""
    slots = len(config.windows)
    layout = spec("layers", "batch", "seq", "act_kv_heads", None)

    def buffer(slot: int) -> jax.Array:
        layers = len(range(slot, config.num_hidden_layers, slots))
        held = min(length, config.windows[slot] or length)
        shape = (layers, batch, held, config.num_key_value_heads, config.head_dim)
        return jnp.zeros(shape, dtype, out_sharding=layout)

    zeros = tuple(buffer(slot) for slot in range(slots))
    return KVCache(zeros, zeros)


def attend_and_fill(segment_ids: jax.Array) -> Attend:
    """Prefill: attention within the prompt's own rows, whose last keys and values are written into the cache."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, cache: KVCache) -> tuple[jax.Array, KVCache]:
        mask = Mask(causal=True, window=layer.window)
        out = attention(q, k, v, mask=mask, q_segments=segment_ids, kv_segments=segment_ids, scale=q.shape[-1] ** -0.5)
        held = cache.k[layer.slot].shape[2]
        return out, _write(cache, _last(k, held), _last(v, held), layer, 0)

    return attend


def attend_to_cache(segment_ids: jax.Array, index: jax.Array) -> Attend:
    """Decoding: one token per row, at `index`, sees what the cache holds up to it. segment_ids int32 [batch, length]."""
    here = jax.lax.dynamic_slice_in_dim(segment_ids, index, 1, axis=1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, cache: KVCache) -> tuple[jax.Array, KVCache]:
        held = cache.k[layer.slot].shape[2]
        cache = _write(cache, k, v, layer, index % held)
        keys, values = (
            jax.lax.dynamic_index_in_dim(buffers[layer.slot], layer.index, axis=0, keepdims=False)
            for buffers in (cache.k, cache.v)
        )
        ring = held < segment_ids.shape[1]  # then all that it holds lies in the window
        seen = _held_segments(segment_ids, index, held) if ring else segment_ids
        out = attention(
            q, keys, values,
            mask=Mask(causal=not ring), q_segments=here, kv_segments=seen, q_offset=0 if ring else index,
            scale=q.shape[-1] ** -0.5,
        )  # fmt: skip
        return out, cache

    return attend


def _held_segments(segment_ids: jax.Array, index: jax.Array, held: int) -> jax.Array:
    """The segment of the token at each place of a ring that holds the indices up to `index`; 0 where none came yet."""
    there = index - (index - jnp.arange(held, dtype=jnp.int32)) % held
    known = segment_ids.at[:, jnp.maximum(there, 0)].get(out_sharding=spec("batch", "seq"))
    return jnp.where(there >= 0, known, 0)


def _last(x: jax.Array, held: int) -> jax.Array:
    """The last tokens of a row [batch, seq, ...] that a ring of this length holds, each at its place."""
    seq = x.shape[1]
    return x if seq <= held else jnp.roll(x[:, seq - held :], seq % held, axis=1)


def _write(cache: KVCache, k: jax.Array, v: jax.Array, layer: Layer, index: jax.Array | int) -> KVCache:
    zero = jnp.zeros((), jnp.int32)
    at = (jnp.asarray(layer.index, jnp.int32), zero, jnp.asarray(index, jnp.int32), zero, zero)

    def put(buffers: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
        buffer = buffers[layer.slot]
        written = jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), at)
        return (*buffers[: layer.slot], written, *buffers[layer.slot + 1 :])

    return KVCache(put(cache.k, k), put(cache.v, v))
