"""DoRA: a matrix as the lengths of its columns times their directions (Liu et al. 2024, arXiv:2402.09353, equations 5 and 6).

    V = base + scale * a @ b                    LoRA moves the directions
    W = magnitude * V / |V|                     |V|: the length of each column, [out]

|V| is a constant to differentiation (section 4.3 of the paper, and peft). It is formed without forming V: of column j,

    |V_j|^2 = |base_j|^2 + 2 scale * sum_r b_rj (a.T @ base)_rj + scale^2 * sum_r b_rj (a.T @ a @ b)_rj

where the first term never changes and is kept, and the second costs `rank` more rows through the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from llmtune.weights.contract import contract
from llmtune.weights.doors import Weight, linear
from llmtune.weights.dropout import drop
from llmtune.weights.gather import gather
from llmtune.weights.lora import LoRA
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Adapter


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoRA(Adapter):
    """low: a LoRA on a matrix [..., in, out]; magnitude [..., out]; square [..., out], of the base's columns. float32."""

    low: LoRA
    magnitude: jax.Array
    square: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("low", "magnitude")

    @property
    def base(self) -> Weight:
        """What lies under the adapter."""
        return self.low.base

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ W. Where dropout is on, only what the adapter adds to x @ base sees the dropped x, as in peft."""
        gain = self._gain(x.dtype, out_axes[-1])
        plain = linear(x, self.base, out_axes)
        if self.low.key is None:
            return gain * (plain + self.low.product(x, out_axes))
        dropped = drop(x, self.low.key, self.low.dropout)
        return plain + (gain - 1) * linear(dropped, self.base, out_axes) + gain * self.low.product(dropped, out_axes)

    def _gain(self, dtype: jnp.dtype, out_axis: str | None) -> jax.Array:
        """Magnitude / |V|, [out]. A layer of the stack that is not adapted (its scale is zero) keeps its columns."""
        scale = self.low.scale
        a, b = (jax.lax.stop_gradient(gather(own)) for own in (self.low.a, self.low.b))  # all of |V| that could train
        axes = (None, None, out_axis)
        across = linear(a.T[None].astype(dtype), self.base, axes)[0].astype(jnp.float32)
        within = linear(contract(a.T[None], a, "io", (None, None, "act_rank")), b, axes)[0]
        squares = gather(self.square) + (b * (2 * scale * across + scale**2 * within)).sum(axis=0)
        return jnp.where(scale == 0, 1.0, gather(self.magnitude) / jnp.sqrt(squares)).astype(dtype)

    def dense(self) -> jax.Array:
        """Magnitude * V / |V|, in float32."""
        v = self.low.dense()
        gain = self.magnitude / jnp.linalg.norm(v, axis=-2)
        return jnp.where(self.low.scale[..., None] == 0, 1.0, gain)[..., None, :] * v

    def with_key(self, key: jax.Array) -> "DoRA":
        """The key goes to the low-rank product."""
        return replace(self, low=self.low.with_key(key))


def measured(weights: Mapping[str, DoRA], *, magnitude: bool) -> dict[str, DoRA]:
    """The squares of the base's columns filled in, and, where asked for, magnitudes under which nothing changes yet.

    To be called under the mesh; one program for all weights, a layer at a time.
    """

    def lay_out(value: jax.Array, like: jax.Array) -> jax.Array:
        return jax.sharding.reshard(value, jax.typeof(like).sharding.spec)

    def measure(weight: DoRA) -> tuple[jax.Array, jax.Array]:
        own = jnp.sqrt(_squares(weight.low)) if magnitude else weight.magnitude
        return lay_out(_squares(weight.base), weight.square), lay_out(own, weight.magnitude)

    found = jax.jit(lambda weights: {path: measure(weight) for path, weight in weights.items()})(weights)
    return {path: replace(weights[path], square=square, magnitude=own) for path, (square, own) in found.items()}


def _squares(w: Weight) -> jax.Array:
    """Of each column's length."""

    def of_matrix(own: Weight) -> jax.Array:
        return jnp.square(dense(own)).sum(axis=-2)

    return of_matrix(w) if len(w.shape) == 2 else jax.lax.map(of_matrix, w)
