"""The decoder: embed, scan over blocks, norm. One layout of parameters for every model.

    Decoder(config)  --nnx.split, once-->  (graphdef, declared params)

    embed/table                        [vocab, hidden]
    layers/0/attention_norm/weight     [L, hidden]           segment 0: L layers stacked, scanned
    layers/0/attention/{q,k,v,o}/kernel
    layers/0/mlp_norm/weight
    layers/0/mlp/{gate,up,down}/kernel
    norm/weight                        [hidden]
    head/kernel                        [hidden, vocab], or None where tied to embed/table
    layers/0/attention/prefix, layers/0/mlp/adapter, prompt, head/score, head/value: slots, None while empty

Modules hold `ArraySpec` declarations until the caller merges arrays, operators or tracers into the same structure, so
building a decoder allocates nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmtune.models.attention import Attend, Attention, Rotation
from llmtune.models.config import ModelConfig
from llmtune.models.mlp import MLP
from llmtune.models.norm import RMSNorm
from llmtune.models.rope import rotations
from llmtune.weights import ArraySpec, Tied, Weight, embed_lookup, normal

Params = dict[str, Any]
Remat = Callable[[Callable], Callable]  # wraps the function of one block: the identity, or jax.checkpoint with a policy


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Attend, layer: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        mixed, cache = self.attention(self.attention_norm(x), rotation, attend, layer, cache)
        x = checkpoint_name(x + mixed, "attended")
        return x + self.mlp(self.mlp_norm(x)), cache


class Embed(nnx.Module):
    """Token ids to vectors."""

    def __init__(self, config: ModelConfig):
        shape = (config.vocab_size, config.hidden_size)
        self.table: nnx.Param[Any] = nnx.Param(
            ArraySpec(shape, ("vocab", "embed"), init=normal(config.initializer_range))
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        return embed_lookup(ids, self.table.get_value())


class Head(nnx.Module):
    """What stands on the last hidden state: the language model's head, and slots for a score and a value."""

    def __init__(self, config: ModelConfig):
        shape = (config.hidden_size, config.vocab_size)
        kernel = ArraySpec(shape, ("embed", "vocab"), init=normal(config.initializer_range))
        self.kernel: nnx.Param[Any] = nnx.Param(None if config.tie_word_embeddings else kernel)
        self.score: nnx.Param[Any] = nnx.Param(None)
        self.value: nnx.Param[Any] = nnx.Param(None)


class Decoder(nnx.Module):
    """int32 [batch, seq] -> hidden states [batch, seq, hidden]; `head_weight` takes them to logits."""

    def __init__(self, config: ModelConfig):
        self.embed = Embed(config)
        self.layers = nnx.List([_stack(Block(config), config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config)
        self.prompt: nnx.Param[Any] = nnx.Param(None)
        self.config = config

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        *,
        cache: Any = None,
        dtype: Any = jnp.float32,
        remat: Remat = lambda block: block,
    ) -> tuple[jax.Array, Any]:
        """Hidden states after the last norm, in `dtype`, and the cache as `attend` left it.

        tokens and positions int32 [batch, seq]; the cache, where there is one, is carried through all layers, so that
        writing one token's keys touches no other layer's.
        """
        x = self.embed(tokens).astype(dtype)
        rotation = rotations(self.config.rope, self.config.head_dim, positions)
        first = 0
        for segment in self.layers:
            block, stacked = nnx.split(segment)

            def step(carry, scanned, block=block):
                params, layer = scanned
                x, cache = carry
                return nnx.merge(block, params)(x, rotation, attend, layer, cache), None

            depth = jax.tree.leaves(stacked)[0].shape[0]
            layers = jnp.arange(first, first + depth, dtype=jnp.int32)
            (x, cache), _ = jax.lax.scan(remat(step), (x, cache), (stacked, layers))
            first += depth
        return self.norm(x), cache

    def head_weight(self) -> Weight:
        """The matrix [hidden, vocab], as an array or an operator."""
        kernel = self.head.kernel.get_value()
        return Tied(self.embed.table.get_value()) if kernel is None else kernel


def _stack(block: Block, layers: int) -> Block:
    """The same block with every declared parameter stacked over `layers`."""
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(lambda spec: spec.stacked(layers), state))


def declare(config: ModelConfig) -> tuple[Any, Params]:
    """The decoder's (graphdef, declared parameters): a nested dict whose leaves are ArraySpec, or None in empty slots."""
    graphdef, state = nnx.split(Decoder(config))
    return graphdef, nnx.to_pure_dict(state)
