"""P-tuning's other encoder: a prompt that a bidirectional LSTM makes (Liu et al. 2021, arXiv:2103.10385, section 3.2).

    table -> two layers of LSTM, each reading both ways -> relu(. w1 + b1) . w2 + b2        peft's encoder of type LSTM

The cell is torch's (Hochreiter and Schmidhuber 1997), gates in its order: i, f, g, o = . w_in + b_in + h w_back + b_back;
c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c).
"""

from dataclasses import dataclass
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from llmtune.sharding import placed_by_compiler
from llmtune.weights.operator import Node
from llmtune.weights.virtual import VirtualPrompt

EXACT = jax.lax.Precision.HIGHEST


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recurrence(Node):
    """One layer, both ways: w_in [2, in, 4 inner], w_back [2, inner, 4 inner], b_in and b_back [2, 4 inner]."""

    w_in: jax.Array
    w_back: jax.Array
    b_in: jax.Array
    b_back: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("w_in", "w_back", "b_in", "b_back")

    def read(self, x: jax.Array) -> jax.Array:
        """[length, in] -> [length, 2 inner]: what was read from the first on, and from the last on."""
        return jnp.concatenate([self._one_way(x, 0), self._one_way(x[::-1], 1)[::-1]], axis=-1)

    def _one_way(self, x: jax.Array, way: int) -> jax.Array:
        given = jnp.matmul(x, self.w_in[way], precision=EXACT) + self.b_in[way] + self.b_back[way]

        def step(carry: tuple[jax.Array, jax.Array], own: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h, c = carry
            i, f, g, o = jnp.split(own + jnp.matmul(h, self.w_back[way], precision=EXACT), 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros(self.w_back.shape[1:2], x.dtype)
        return jax.lax.scan(step, (zeros, zeros), given)[1]


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentPrompt(VirtualPrompt):
    """table [length, hidden], two layers, and w1 [2 inner, 2 inner], w2 [2 inner, hidden] with their biases.

    Only what comes out of it is kept in the end, as of `EncodedPrompt`.
    """

    table: jax.Array
    first: Recurrence
    second: Recurrence
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("table", "first", "second", "w1", "b1", "w2", "b2")

    @property
    def length(self) -> int:
        """See `VirtualPrompt.length`."""
        return self.table.shape[0]

    def vectors(self) -> jax.Array:
        """See `VirtualPrompt.vectors`."""
        if jax.sharding.get_abstract_mesh().empty:
            return _vectors(self)
        return placed_by_compiler(_vectors, None, None)(self)


def _vectors(own: RecurrentPrompt) -> jax.Array:
    """The encoder is small and works through n vectors one after the other: the compiler lays it out."""
    x = own.second.read(own.first.read(own.table))
    x = jax.nn.relu(jnp.matmul(x, own.w1, precision=EXACT) + own.b1)
    return jnp.matmul(x, own.w2, precision=EXACT) + own.b2
