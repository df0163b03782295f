"""The key-value cache, written in place as the scan over layers carries it: one buffer for each slot of the layers' pattern.

Where all layers are alike there is one slot. Keys and values lie the way attention's two products read them, so that no copy
of the cache is made for either. Layers with a window keep only as many tokens as it is wide, in a ring: index i
lies at i mod window. Windows go by index in the row, and the ring holds the last indices whatever padding a row begins with.
"""

import abc
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp

from llmtune.kernels import Mask, attention, cached_attention
from llmtune.models.attention import Attend, Layer
from llmtune.models.config import ModelConfig
from llmtune.sharding import spec


class Cache(abc.ABC):
    """Keys [batch, kv_heads, head_dim, held] and values [batch, kv_heads, held, head_dim] of every layer.

    held: the length of the rows, or the window of the layer.
    """

    @abc.abstractmethod
    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """(keys, values) of one layer."""

    @abc.abstractmethod
    def write(self, layer: Layer, k: jax.Array, v: jax.Array, index: jax.Array | int) -> "Cache":
        """K and v [batch, tokens, kv_heads, head_dim] in the places that begin at `index`."""

    def held(self, layer: Layer) -> int:
        """How many tokens of a row the layer keeps."""
        return self.read(layer)[0].shape[-1]


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedCache(Cache):
    """The layers of each slot of the pattern in one buffer, k [layers, batch, ...] and v likewise."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """See `Cache.read`."""
        k, v = (
            jax.lax.dynamic_index_in_dim(buffers[layer.slot], layer.index, axis=0, keepdims=False)
            for buffers in (self.k, self.v)
        )
        return k, v

    def write(self, layer: Layer, k: jax.Array, v: jax.Array, index: jax.Array | int) -> "StackedCache":
        """See `Cache.write`."""
        zero, row, place = (jnp.asarray(at, jnp.int32) for at in (0, layer.index, index))
        keys, values = _as_held(k, v)
        return StackedCache(
            _put(self.k, layer.slot, keys[None], (row, zero, zero, zero, place)),
            _put(self.v, layer.slot, values[None], (row, zero, zero, place, zero)),
        )


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache(Cache):
    """Each layer in buffers of its own; every layer is a slot."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """See `Cache.read`."""
        return self.k[layer.slot], self.v[layer.slot]

    def write(self, layer: Layer, k: jax.Array, v: jax.Array, index: jax.Array | int) -> "LayerCache":
        """See `Cache.write`."""
        zero, place = (jnp.asarray(at, jnp.int32) for at in (0, index))
        keys, values = _as_held(k, v)
        return LayerCache(
            _put(self.k, layer.slot, keys, (zero, zero, zero, place)),
            _put(self.v, layer.slot, values, (zero, zero, place, zero)),
        )


def _as_held(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)


def _put(buffers: tuple[jax.Array, ...], slot: int, new: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    written = jax.lax.dynamic_update_slice(buffers[slot], new.astype(buffers[slot].dtype), at)
    return (*buffers[:slot], written, *buffers[slot + 1 :])


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> StackedCache:
    """Zeros, laid out like keys and values."""
    slots, heads, size = len(config.windows), config.num_key_value_heads, config.head_dim
    layout = spec("layers", "batch", "act_kv_heads", None, None)

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=layout)

    layers = [len(range(slot, config.num_hidden_layers, slots)) for slot in range(slots)]
    held = [min(length, window or length) for window in config.windows]
    sizes = list(zip(layers, held, strict=True))
    return StackedCache(
        k=tuple(zeros(n, batch, heads, size, places) for n, places in sizes),
        v=tuple(zeros(n, batch, heads, places, size) for n, places in sizes),
    )


def attend_and_fill(segment_ids: jax.Array) -> Attend:
    """Prefill: attention within the prompt's own rows, whose last keys and values are written into the cache."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, cache: Cache) -> tuple[jax.Array, Cache]:
        mask = Mask(causal=True, window=layer.window)
        out = attention(q, k, v, mask=mask, segments=segment_ids, scale=q.shape[-1] ** -0.5)
        held = cache.held(layer)
        return out, cache.write(layer, _last(k, held), _last(v, held), 0)

    return attend


def attend_to_cache(segment_ids: jax.Array, index: jax.Array) -> Attend:
    """Decoding: one token per row, at `index`, sees what the cache holds up to it. segment_ids int32 [batch, length]."""
    here = jax.lax.dynamic_slice_in_dim(segment_ids, index, 1, axis=1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, cache: Cache) -> tuple[jax.Array, Cache]:
        held = cache.held(layer)
        cache = cache.write(layer, k, v, index % held)
        keys, values = cache.read(layer)
        seen = (_held_segments(segment_ids, index, held) == here) & (here > 0)
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
