"""Grouped-query attention: projections and rotations; the product itself is a function passed in.

`attend(q, k, v, layer, cache) -> (out, cache)` is what differs between training (causal and segment masks over the row) and
decoding (a key-value cache), so this module has no flags for either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmtune.models.config import ModelConfig
from llmtune.models.linear import Linear
from llmtune.models.rope import Rotations, rotate
from llmtune.sharding import spec
from llmtune.weights import normal


class Layer(NamedTuple):
    """Which layer attends: its `slot` in the repeating pattern of windows, in the `index`-th repetition (int32 [])."""

    slot: int
    index: jax.Array | int
    window: int | None


# q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads, head_dim], layer, cache -> (like q, cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Layer, Any], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """[batch, seq, hidden] -> the same. `prefix` is the slot of prefix tuning."""

    def __init__(self, config: ModelConfig):
        hidden, size, init = config.hidden_size, config.head_dim, normal(config.initializer_range)
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        q_axes, kv_axes, out_axes = (("batch", "seq", name) for name in ("act_heads", "act_kv_heads", "act_embed"))
        self.q = Linear(hidden, heads * size, ("embed", "heads"), init=init, out_axes=q_axes, bias=bias)
        self.k = Linear(hidden, kv_heads * size, ("embed", "kv_heads"), init=init, out_axes=kv_axes, bias=bias)
        self.v = Linear(hidden, kv_heads * size, ("embed", "kv_heads"), init=init, out_axes=kv_axes, bias=bias)
        self.o = Linear(heads * size, hidden, ("heads", "embed"), init=init, out_axes=out_axes, bias=bias)
        self.prefix = nnx.Param(None)
        self.heads, self.kv_heads = heads, kv_heads

    def __call__(
        self, x: jax.Array, rotations: Rotations, attend: Attend, layer: Layer, cache: Any
    ) -> tuple[jax.Array, Any]:
        q = checkpoint_name(rotate(_split_heads(self.q(x), self.heads, "act_heads"), rotations.queries), "q")
        k = checkpoint_name(rotate(_split_heads(self.k(x), self.kv_heads, "act_kv_heads"), rotations.keys), "k")
        v = checkpoint_name(_split_heads(self.v(x), self.kv_heads, "act_kv_heads"), "v")
        out, cache = attend(q, k, v, layer, cache)
        return self.o(_merge_heads(out)), cache


def _split_heads(x: jax.Array, heads: int, axis: str) -> jax.Array:
    """[batch, seq, heads * head_dim] -> [batch, seq, heads, head_dim]."""
    batch, seq, width = x.shape
    return jax.lax.reshape(x, (batch, seq, heads, width // heads), out_sharding=spec("batch", "seq", axis, None))


def _merge_heads(x: jax.Array) -> jax.Array:
    """[batch, seq, heads, head_dim] -> [batch, seq, heads * head_dim]."""
    batch, seq, heads, size = x.shape
    return jax.lax.reshape(x, (batch, seq, heads * size), out_sharding=spec("batch", "seq", "act_heads"))
