"""The key-value cache, written in place as the scan over layers carries it: one buffer for each slot of the layers' pattern.

Where all layers are alike there is one slot. Keys and values lie the way attention's two products read them, so that no copy
of the cache is made for either. Layers with a window keep only as many tokens as it is wide, in a ring: index i
lies at i mod window. Windows go by index in the row, and the ring holds the last indices whatever padding a row begins with.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.kernels import Mask, attention, cached_attention
from llmtune.models.attention import Attend, Layer
from llmtune.models.config import ModelConfig
from llmtune.sharding import spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """For each slot, k [layers of the slot, batch, kv_heads, head_dim, held] and v [..., held, head_dim].

    held: the length of the rows, or the window of the slot's layers.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """Zeros, laid out like keys and values."""
    slots = len(config.windows)
    layout = spec("layers", "batch", "act_kv_heads", None, None)

    def buffers(*order: int) -> tuple[jax.Array, ...]:
        shapes = []
        for slot in range(slots):
            layers, held = (
                len(range(slot, config.num_hidden_layers, slots)),
                min(length, config.windows[slot] or length),
            )
            inner = (config.head_dim, held)
            shapes.append((layers, batch, config.num_key_value_heads, inner[order[0]], inner[order[1]]))
        return tuple(jnp.zeros(shape, dtype, out_sharding=layout) for shape in shapes)

    return KVCache(k=buffers(0, 1), v=buffers(1, 0))


def attend_and_fill(segment_ids: jax.Array) -> Attend:
    """Prefill: attention within the prompt's own rows, whose last keys and values are written into the cache."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, cache: KVCache) -> tuple[jax.Array, KVCache]:
        mask = Mask(causal=True, window=layer.window)
        out = attention(q, k, v, mask=mask, q_segments=segment_ids, kv_segments=segment_ids, scale=q.shape[-1] ** -0.5)
        held = _held(cache, layer)
        return out, _write(cache, _last(k, held), _last(v, held), layer, 0)

    return attend


def attend_to_cache(segment_ids: jax.Array, index: jax.Array) -> Attend:
    """Decoding: one token per row, at `index`, sees what the cache holds up to it. segment_ids int32 [batch, length]."""
    here = jax.lax.dynamic_slice_in_dim(segment_ids, index, 1, axis=1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, cache: KVCache) -> tuple[jax.Array, KVCache]:
        held = _held(cache, layer)
        # The barrier keeps XLA from fusing the write into both of its uses, which would copy the whole cache for each.
        cache = jax.lax.optimization_barrier(_write(cache, k, v, layer, index % held))
        keys, values = (
            jax.lax.dynamic_index_in_dim(buffers[layer.slot], layer.index, axis=0, keepdims=False)
            for buffers in (cache.k, cache.v)
        )
        held_segments = _held_segments(segment_ids, index, held)
        seen = (held_segments == here) & (here > 0)
        return cached_attention(q, keys, values, seen, scale=q.shape[-1] ** -0.5), cache

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


def _held(cache: KVCache, layer: Layer) -> int:
    """How many tokens of a row the layer's buffers hold."""
    return cache.k[layer.slot].shape[-1]


def _write(cache: KVCache, k: jax.Array, v: jax.Array, layer: Layer, index: jax.Array | int) -> KVCache:
    """K and v [batch, tokens, kv_heads, head_dim] into the places that begin at `index`."""
    zero = jnp.zeros((), jnp.int32)
    row, place = jnp.asarray(layer.index, jnp.int32), jnp.asarray(index, jnp.int32)

    def put(buffers: tuple[jax.Array, ...], new: jax.Array, *at: jax.Array) -> tuple[jax.Array, ...]:
        buffer = buffers[layer.slot]
        written = jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), (row, zero, zero, *at))
        return (*buffers[: layer.slot], written, *buffers[layer.slot + 1 :])

    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    return KVCache(put(cache.k, keys, zero, place), put(cache.v, values, place, zero))
