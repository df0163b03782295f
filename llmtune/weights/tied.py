"""A tied head: the embedding table, multiplied by in its transpose."""

from dataclasses import dataclass
from typing import ClassVar, final

import jax

from llmtune.weights.doors import unembed
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Operator


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tied(Operator):
    """`table` [vocab, embed] as the matrix [embed, vocab]. Gradients of both uses of the table add up."""

    table: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("table",)

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ table.T."""
        return unembed(x, self.table, out_axes)

    def dense(self) -> jax.Array:
        """table.T, in float32."""
        return dense(self.table).swapaxes(-1, -2)

    @property
    def shape(self) -> tuple[int, ...]:
        """[embed, vocab]."""
        return (self.table.shape[-1], self.table.shape[-2])

    @property
    def axes(self) -> tuple[str | None, ...]:
        """("embed", "vocab")."""
        return self.table.axes[::-1]  # type: ignore[attr-defined]
