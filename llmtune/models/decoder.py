"""The decoder: embed, scan over blocks, norm. One layout of parameters for every model.

    Decoder(config)  --nnx.split, once-->  (graphdef, declared params)

    embed/table                        [vocab, hidden]
    layers/0/attention_norm/weight     [L, hidden]           segment 0: L layers stacked, scanned
    layers/0/attention/{q,k,v,o}/kernel         and bias, where the architecture has one
    layers/0/mlp_norm/weight
    layers/0/mlp/{gate,up,down}/kernel          [L, in, out]; of experts: mlp/router and mlp/experts, [L, E, in, out]
    norm/weight                        [hidden]
    head/kernel                        [hidden, vocab], or None where tied to embed/table
    layers/0/attention/prefix, layers/0/mlp/adapter, prompt, attention_dropout, head/score, head/value: slots, None while empty

Modules hold `ArraySpec` declarations until the caller merges arrays, operators or tracers into the same structure, so
building a decoder allocates nothing.

Layers whose windows follow a pattern are scanned a period at a time, [L] as [L/p, p]; what is left over is unrolled. The
pattern is no part of the layout of parameters, and neither trace nor compile time grows with the number of layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmtune.models.attention import Attend, Attention, Layer
from llmtune.models.config import ModelConfig
from llmtune.models.mlp import MLP, Sums
from llmtune.models.moe import MoE
from llmtune.models.norm import RMSNorm
from llmtune.models.residual import beside_blocks, within_blocks
from llmtune.models.rope import Rotations, rotations
from llmtune.weights import (
    ArraySpec,
    Tied,
    Weight,
    embed_lookup,
    join_shared,
    normal,
    places,
    split_shared,
)

Params = dict[str, Any]
INPUT = "block_input"  # by this name a remat policy finds what a block begins with
Remat = Callable[[Callable], Callable]  # wraps the function of one block: the identity, or jax.checkpoint with a policy


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config) if config.experts is None else MoE(config)

    def __call__(
        self,
        x: jax.Array,
        rotations: Rotations,
        attend: Attend,
        layer: Layer,
        cache: Any,
        counted: jax.Array | None = None,
        virtual: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Sums]:
        x = checkpoint_name(x, INPUT)
        mixed, cache = self.attention(within_blocks(self.attention_norm(x)), rotations, attend, layer, cache, virtual)
        x = checkpoint_name(x + mixed, "attended")
        fed, sums = self.mlp(within_blocks(self.mlp_norm(x)), counted)
        return x + fed, cache, sums


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

    def __init__(self, config: ModelConfig, segments: Sequence[int]):
        self.embed = Embed(config)
        self.layers = nnx.List([_stack(Block(config), layers) for layers in segments])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config)
        self.prompt: nnx.Param[Any] = nnx.Param(None)
        self.attention_dropout: nnx.Param[Any] = nnx.Param(None)
        self.config = config

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        *,
        cache: Any = None,
        counted: jax.Array | None = None,
        dtype: Any = jnp.float32,
        remat: Remat = lambda block: block,
    ) -> tuple[jax.Array, Any, Sums]:
        """Hidden states after the last norm, in `dtype`, the cache as `attend` left it, and sums over the layers' routing.

        tokens and positions int32 [batch, seq]; the cache, where there is one, is carried through all layers, so that
        writing one token's keys touches no other layer's. `counted` float32 [batch, seq]: 1 where a token's routing counts
        (default: all); without experts the sums are empty. The first `virtual_tokens()` positions of a document are those
        of virtual tokens, whatever id stands there.
        """
        x = self.embed(tokens).astype(dtype)
        number = self.virtual_tokens()
        virtual = places(positions, number) if number else None
        prompt = self.prompt.get_value()
        if prompt is not None:
            x = prompt.put(x, virtual)
        x = beside_blocks(x)
        turns = rotations(self.config.rope, self.config.head_dim, positions)
        total: Sums = {}
        first = 0
        for segment in self.layers:
            block, weights = nnx.split(segment)
            stacked, shared = split_shared(weights)

            def call(x, cache, params, layer, block=block, shared=shared):
                module = nnx.merge(block, join_shared(params, shared))
                return module(x, turns, attend, layer, cache, counted, virtual)

            x, cache, sums = _scan_layers(call, stacked, first, self.config.windows, x, cache, remat)
            total = _add(total, sums)
            first += _depth(stacked)
        return within_blocks(self.norm(x)), cache, total

    def virtual_tokens(self) -> int:
        """How many virtual tokens each document begins with: as many as fill the slots `prompt` or `attention/prefix`."""
        fillings = [self.prompt.get_value(), *(segment.attention.prefix.get_value() for segment in self.layers)]
        return max((filling.length for filling in fillings if filling is not None), default=0)

    def head_weight(self) -> Weight:
        """The matrix [hidden, vocab], as an array or an operator."""
        kernel = self.head.kernel.get_value()
        return Tied(self.embed.table.get_value()) if kernel is None else kernel


def _scan_layers(
    call: Callable, stacked: Any, first: int, windows: tuple[int | None, ...], x: jax.Array, cache: Any, remat: Remat
) -> tuple[jax.Array, Any, Sums]:
    """`call(x, cache, params, layer)` for every layer of a segment whose first layer is the model's `first`."""
    period, depth = len(windows), _depth(stacked)
    repeats, over = divmod(depth, period)

    def one(slot: int) -> Callable:
        """The function of the layer at this place of the pattern: what is static is closed over, and `remat` wraps it."""
        return remat(lambda x, cache, params, index: call(x, cache, params, Layer(slot, index, windows[slot])))

    slots = [(first + n) % period for n in range(period)]
    calls = [one(slot) for slot in slots]

    def step(carry, scanned):
        (x, cache), (params, repeat) = carry, scanned
        total: Sums = {}
        for n, function in enumerate(calls):
            own = params if period == 1 else jax.tree.map(lambda leaf, n=n: leaf[n], params)
            x, cache, sums = function(x, cache, own, (first + n) // period + repeat)
            total = _add(total, sums)
        return (x, cache), total

    total: Sums = {}
    if repeats:
        periods = stacked if period == 1 else jax.tree.map(lambda leaf: _by_period(leaf, repeats, period), stacked)
        (x, cache), each = jax.lax.scan(step, (x, cache), (periods, jnp.arange(repeats, dtype=jnp.int32)))
        total = jax.tree.map(lambda sums: sums.sum(axis=0), each)
    for n in range(depth - over, depth):
        own = jax.tree.map(lambda leaf, n=n: leaf[n], stacked)
        x, cache, sums = calls[n % period](x, cache, own, jnp.int32((first + n) // period))
        total = _add(total, sums)
    return x, cache, total


def _by_period(leaf: jax.Array, repeats: int, period: int) -> jax.Array:
    """[L, ...] -> [L / period, period, ...], what is left over cut off."""
    whole = leaf if leaf.shape[0] == repeats * period else leaf[: repeats * period]
    return whole.reshape(repeats, period, *leaf.shape[1:])


def _depth(stacked: Any) -> int:
    return jax.tree.leaves(stacked)[0].shape[0]


def _add(one: Sums, other: Sums) -> Sums:
    return {name: one[name] + value if name in one else value for name, value in other.items()} or one


def _stack(block: Block, layers: int) -> Block:
    """The same block with every declared parameter stacked over `layers`."""
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(lambda spec: spec.stacked(layers), state))


def declare(config: ModelConfig, segments: Sequence[int] | None = None) -> tuple[Any, Params]:
    """The decoder's (graphdef, declared parameters): a nested dict whose leaves are ArraySpec, or None in empty slots.

    segments: how many layers each contiguous stack holds (default: one stack of all).
    """
    graphdef, state = nnx.split(Decoder(config, [config.num_hidden_layers] if segments is None else segments))
    return graphdef, nnx.to_pure_dict(state)
