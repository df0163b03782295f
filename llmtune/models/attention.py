"""Grouped-query attention: projections and rotations; the product itself is a function passed in.

`attend(q, k, v, layer, cache) -> (out, cache)` is what differs between training (causal and segment masks over the row) and
decoding (a key-value cache), so this module has no flags for either.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmtune.models.config import ModelConfig
from llmtune.models.linear import Linear
from llmtune.models.residual import RESIDUAL
from llmtune.models.rope import Rotations, rotate
from llmtune.sharding import spec
from llmtune.weights import normal, put


class Layer(NamedTuple):
    """Which layer attends: its `slot` in the repeating pattern of windows, in the `index`-th repetition (int32 [])."""

    slot: int
    index: jax.Array | int
    window: int | None


# q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads, head_dim], layer, cache -> (like q, cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Layer, Any], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """[batch, seq, hidden] -> the same, laid out as RESIDUAL.

    `prefix` is the slot of prefix tuning; `virtual` says where its tokens stand.
    """

    def __init__(self, config: ModelConfig):
        hidden, size, init = config.hidden_size, config.head_dim, normal(config.initializer_range)
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        q_axes, kv_axes, out_axes = (*(("batch", "seq", name) for name in ("act_heads", "act_kv_heads")), RESIDUAL)
        declare = functools.partial(Linear, init=init, bias=bias)
        self.q = declare(hidden, heads * size, ("embed", "heads"), out_axes=q_axes, heads=heads)
        self.k = declare(hidden, kv_heads * size, ("embed", "kv_heads"), out_axes=kv_axes, heads=kv_heads)
        self.v = declare(hidden, kv_heads * size, ("embed", "kv_heads"), out_axes=kv_axes, heads=kv_heads)
        self.o = declare(heads * size, hidden, ("heads", "embed"), out_axes=out_axes)
        self.prefix: nnx.Param[Any] = nnx.Param(None)
        self.heads, self.kv_heads = heads, kv_heads

    def __call__(
        self,
        x: jax.Array,
        rotations: Rotations,
        attend: Attend,
        layer: Layer,
        cache: Any,
        virtual: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        q = checkpoint_name(rotate(_split_heads(self.q(x), self.heads, "act_heads"), rotations.queries), "q")
        k = checkpoint_name(rotate(_split_heads(self.k(x), self.kv_heads, "act_kv_heads"), rotations.keys), "k")
        v = checkpoint_name(_split_heads(self.v(x), self.kv_heads, "act_kv_heads"), "v")
        if virtual is not None:
            k, v = self.prefixed(k, v, virtual)
        out, cache = attend(q, k, v, layer, cache)
        return self.o(_merge_heads(out)), cache

    def prefixed(self, k: jax.Array, v: jax.Array, virtual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values with the learned ones in the places of virtual tokens, where there is a prefix."""
        prefix = self.prefix.get_value()
        if prefix is None:
            return k, v
        learned = (_split_heads(x, self.kv_heads, "act_kv_heads") for x in prefix.spread(virtual, k.dtype))
        return tuple(put(x, own, virtual) for x, own in zip((k, v), learned, strict=True))  # type: ignore[return-value]


def _split_heads(x: jax.Array, heads: int, axis: str) -> jax.Array:
    """[batch, seq, heads * head_dim] -> [batch, seq, heads, head_dim]."""
    batch, seq, width = x.shape
    return jax.lax.reshape(x, (batch, seq, heads, width // heads), out_sharding=spec("batch", "seq", axis, None))


def _merge_heads(x: jax.Array) -> jax.Array:
    """[batch, seq, heads, head_dim] -> [batch, seq, heads * head_dim]."""
    batch, seq, heads, size = x.shape
    return jax.lax.reshape(x, (batch, seq, heads * size), out_sharding=spec("batch", "seq", "act_heads"))
