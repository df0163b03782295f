"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning put before a document's own tokens.

    position        0 ... n-1         n, n+1, ...
    embedding       learned           those of the tokens      Prompt, EncodedPrompt    in the slot `prompt`
    key and value   learned           those of the tokens      Prefix                   in the slot `attention/prefix`

Rows keep n places free where a document begins, and `places` marks them; the tokens' positions go on from there. One rule
serves training, evaluation and decoding alike: what was learned replaces what a marked place would hold. A prefix gets no
rotation, since it replaces keys that were turned already.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from llmtune.weights.doors import linear
from llmtune.weights.gather import gather
from llmtune.weights.operator import Node


def places(positions: jax.Array, number: int) -> jax.Array:
    """Which virtual token stands where: int32 [batch, seq] -> bool [batch, seq, number], false everywhere at a token."""
    return positions[..., None] == jnp.arange(number, dtype=jnp.int32)


def put(x: jax.Array, learned: jax.Array, virtual: jax.Array) -> jax.Array:
    """X with `learned` in its marked places; both [batch, seq, ...]."""
    marked = virtual.any(axis=-1)
    return jnp.where(marked.reshape(*marked.shape, *(1,) * (x.ndim - 2)), learned, x)


def spread(
    virtual: jax.Array, rows: jax.Array, dtype: jax.typing.DTypeLike, out_axes: tuple[str | None, ...]
) -> jax.Array:
    """Rows [number, width] to their places: [batch, seq, width]. A product, whose transpose adds up the gradient."""
    return linear(virtual.astype(dtype), rows, out_axes)


class VirtualPrompt(Node, abc.ABC):
    """What may fill the decoder's slot `prompt`."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """How many virtual tokens there are."""

    @abc.abstractmethod
    def vectors(self) -> jax.Array:
        """Their embeddings, float32 [length, hidden]."""

    def put(self, x: jax.Array, virtual: jax.Array) -> jax.Array:
        """Embeddings [batch, seq, hidden] with the prompt in its places."""
        return put(x, spread(virtual, self.vectors(), x.dtype, ("batch", "seq", "act_embed")), virtual)


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt(VirtualPrompt):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691, section 2): `table` [length, hidden] is the embeddings."""

    table: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("table",)

    @property
    def length(self) -> int:
        """See `VirtualPrompt.length`."""
        return self.table.shape[0]

    def vectors(self) -> jax.Array:
        """See `VirtualPrompt.vectors`."""
        return self.table


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix(Node):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190, section 4): keys and values of every layer.

    k and v [..., length, kv_heads * head_dim], as attention sees them: after the rotation.
    """

    k: jax.Array
    v: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("k", "v")

    @property
    def length(self) -> int:
        """How many virtual tokens there are."""
        return self.k.shape[-2]

    def spread(self, virtual: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """(keys, values) in their places, [batch, seq, kv_heads * head_dim]."""
        out_axes = ("batch", "seq", "act_kv_heads")
        return spread(virtual, self.k, dtype, out_axes), spread(virtual, self.v, dtype, out_axes)


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodedPrompt(VirtualPrompt):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385, section 3.2): the embeddings come out of a small network that trains too.

        table -> relu(. w1 + b1) -> relu(. w2 + b2) -> . w3 + b3        peft's encoder of type MLP

    table [length, hidden], w1 [hidden, inner], w2 [inner, inner], w3 [inner, hidden]. Only what comes out of it is kept in
    the end: an adapter stores `vectors()`.
    """

    table: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array
    w3: jax.Array
    b3: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("table", "w1", "b1", "w2", "b2", "w3", "b3")

    @property
    def length(self) -> int:
        """See `VirtualPrompt.length`."""
        return self.table.shape[0]

    def vectors(self) -> jax.Array:
        """See `VirtualPrompt.vectors`."""
        x = gather(self.table)[None]
        for n, (w, b) in enumerate(((self.w1, self.b1), (self.w2, self.b2), (self.w3, self.b3))):
            x = linear(jax.nn.relu(x) if n else x, w, (None, None, None)) + gather(b)
        return x[0]
