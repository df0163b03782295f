"""Embeddings read with noise: NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

    rows of the table + alpha / sqrt(seq * embed) * uniform(-1, 1)

An operator in the table's place for one training step, so that no model knows of it. `seq` is the length of the row, packed or
padded, as transformers counts it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, final

import jax

from llmtune.weights.doors import Weight, embed_lookup, unembed
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Operator


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noisy(Operator):
    """`base` [vocab, embed], read with noise drawn from `key`; a tied head multiplies by the base as it is."""

    base: Weight
    key: jax.Array
    alpha: float = field(metadata={"static": True})

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of the table, each element with its own noise."""
        rows = embed_lookup(ids, self.base)
        layout = jax.typeof(rows).sharding
        noise = jax.random.uniform(self.key, rows.shape, minval=-1.0, maxval=1.0, out_sharding=layout)
        size = self.alpha / math.sqrt(rows.shape[-2] * rows.shape[-1])
        return rows + (size * noise).astype(rows.dtype)

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """A table is looked up, or multiplied by its transpose."""
        raise TypeError("a noisy table of embeddings is no matrix to multiply by")

    def apply_transposed(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base.T."""
        return unembed(x, self.base, out_axes)

    def dense(self) -> jax.Array:
        """The base, in float32."""
        return dense(self.base)

    @property
    def shape(self) -> tuple[int, ...]:
        """[vocab, embed]."""
        return self.base.shape

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Those of the base."""
        return self.base.axes  # type: ignore[attr-defined]


def with_noise(params: Any, key: jax.Array, alpha: float) -> Any:
    """The same tree, its embedding table read with noise."""
    table = params["embed"]["table"]
    return {**params, "embed": {**params["embed"], "table": Noisy(table, key, alpha)}}
