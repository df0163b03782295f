"""DoRA: a matrix as the lengths of its columns times their directions (Liu et al. 2024, arXiv:2402.09353, equations 5 and 6).

    V = base + scale * a @ b                    LoRA moves the directions
    W = magnitude * V / |V|                     |V|: the length of each column, [out]

|V| is a constant to differentiation (section 4.3 of the paper, and peft). It is formed without forming V: of column j,

    |V_j|^2 = |base_j|^2 + 2 scale * sum_r b_rj (a.T @ base)_rj + scale^2 * sum_r b_rj (a.T @ a @ b)_rj

where the first term never changes and is kept, and the second costs `rank` more rows through the base. Of experts each has
lengths of its own; there it is `rank` more rows for each of them.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmtune.sharding import axis_size, parts, spec
from llmtune.weights.contract import contract, own_vectors
from llmtune.weights.doors import Weight, expert_linear, linear
from llmtune.weights.dropout import drop
from llmtune.weights.gather import gather
from llmtune.weights.lora import LoRA
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Adapter

Rows = Callable[[jax.Array], jax.Array]  # [..., width] -> [..., width]


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoRA(Adapter):
    """low: a LoRA on a matrix [..., in, out]; magnitude [..., out]; square [..., out], of the base's columns. float32.

    `scale` of the LoRA is zero where a layer of the stack is not adapted: it keeps its columns.
    """

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
        return self._stretched(
            x,
            lambda x: linear(x, self.base, out_axes),
            lambda x: self.low.product(x, out_axes),
            lambda out: self._gain(out.dtype, out_axes[-1]),
        )

    def expert_apply(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """The same for sorted rows of experts."""
        return self._stretched(
            x,
            lambda x: expert_linear(x, self.base, group_sizes, out_axes),
            lambda x: self.low.expert_product(x, group_sizes, out_axes),
            lambda out: own_vectors(self._expert_gain(out.dtype, out_axes[-1]), group_sizes, out),
        )

    def _stretched(self, x: jax.Array, base: Rows, product: Rows, gain: Rows) -> jax.Array:
        """`gain` is of the base's result: magnitude / |V|, [out] or one for each row."""
        plain = base(x)
        stretch = gain(plain)
        if self.low.key is None:
            return stretch * (plain + product(x))
        dropped = drop(x, self.low.key, self.low.dropout)
        return plain + (stretch - 1) * base(dropped) + stretch * product(dropped)

    def _gain(self, dtype: jnp.dtype, out_axis: str | None) -> jax.Array:
        """Magnitude / |V|, [out]."""
        a, b, scale = self._constants()
        axes = (None, None, out_axis)
        across = linear(a.T[None].astype(dtype), self.base, axes)[0].astype(jnp.float32)
        within = linear(contract(a.T[None], a, "io", (None, None, "act_rank")), b, axes)[0]
        return self._gain_of(b * (2 * scale * across + scale**2 * within)).astype(dtype)

    def _expert_gain(self, dtype: jnp.dtype, out_axis: str | None) -> jax.Array:
        """The same of each expert, [experts, out]."""
        a, b, scale = self._constants()
        layout, precise = spec("expert", None, out_axis), jax.lax.Precision.HIGHEST
        across = _as_many_each(a.swapaxes(1, 2).astype(dtype), self.base, out_axis).astype(jnp.float32)
        gram = jnp.einsum("eir,eis->ers", a, a, precision=precise, out_sharding=spec("expert", None, None))
        within = jnp.einsum("ers,eso->ero", gram, b, precision=precise, out_sharding=layout)
        scale = scale[:, None, None]
        return self._gain_of(b * (2 * scale * across + scale**2 * within))

    def _constants(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(a, b, scale) without gradients: all of |V| that could train."""
        a, b = (jax.lax.stop_gradient(gather(own)) for own in (self.low.a, self.low.b))
        return a, b, self.low.scale

    def _gain_of(self, changes: jax.Array) -> jax.Array:
        """From what each of the rank's rows adds to |V|^2, [..., rank, out]."""
        squares = gather(self.square) + changes.sum(axis=-2)
        return jnp.where(self.low.scale[..., None] == 0, 1.0, gather(self.magnitude) / jnp.sqrt(squares))

    def dense(self) -> jax.Array:
        """Magnitude * V / |V|, in float32."""
        v = self.low.dense()
        gain = self.magnitude / jnp.linalg.norm(v, axis=-2)
        return jnp.where(self.low.scale[..., None] == 0, 1.0, gain)[..., None, :] * v

    def with_key(self, key: jax.Array) -> "DoRA":
        """The key goes to the low-rank product."""
        return replace(self, low=self.low.with_key(key))


def _as_many_each(rows: jax.Array, w: Weight, out_axis: str | None) -> jax.Array:
    """[experts, rows, in], as many rows for each expert -> [experts, rows, out]. Every device computes its own experts'."""
    (experts, each, n_in), ways, inner = rows.shape, parts("expert"), jax.typeof(rows).sharding.spec[-1]
    layout, whole = spec("expert", None, None), spec("expert", None, out_axis)
    sizes = jax.sharding.reshard(jnp.full((ways, 1, experts // ways), each, jnp.int32), layout)
    laid = PartitionSpec(layout[0], None, None, inner)
    sorted_rows = jax.lax.reshape(rows, (ways, 1, experts // ways * each, n_in), out_sharding=laid)
    out = expert_linear(sorted_rows, w, sizes, ("expert", None, None, out_axis))
    return jax.lax.reshape(out, (experts, each, out.shape[-1]), out_sharding=whole)


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
    """Of each column's length; of a stack, or of experts, one matrix at a time."""

    measure: Callable[[Weight], jax.Array] = _of_matrices
    for _ in w.shape[:-2]:
        measure = functools.partial(_one_by_one, measure)
    return measure(w)


def _of_matrices(w: Weight) -> jax.Array:
    return jnp.square(dense(w)).sum(axis=-2)


def _one_by_one(function: Callable[[Weight], jax.Array], stack: Weight) -> jax.Array:
    """`function` of each of a stack [n, ...]; where n is spread over devices, of [devices, ...], one on each, at a time."""
    part = jax.typeof(jax.tree.leaves(stack)[0]).sharding.spec[0]
    if part is None:
        return jax.lax.map(function, stack)
    ways = axis_size(jax.sharding.get_abstract_mesh(), part)

    def dealt(leaf: jax.Array) -> jax.Array:
        (n, *rest), (_, *layout) = leaf.shape, jax.typeof(leaf).sharding.spec
        apart = jax.lax.reshape(leaf, (ways, n // ways, *rest), out_sharding=PartitionSpec(part, None, *layout))
        return apart.swapaxes(0, 1)

    out = jax.lax.map(function, jax.tree.map(dealt, stack)).swapaxes(0, 1)
    layout = PartitionSpec(part, *jax.typeof(out).sharding.spec[2:])
    return jax.lax.reshape(out, (out.shape[0] * out.shape[1], *out.shape[2:]), out_sharding=layout)
