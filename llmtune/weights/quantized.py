"""A frozen matrix kept as codes: what all quantised formats have in common.

    x @ W  -->  x @ decode(codes, scales)

Three rules, each measured to matter:

- Decoding happens inside `jax.checkpoint`: what is kept for the backward pass are the codes. Else a scan over layers would
  stack every decoded matrix as a residual, and training would hold the dense model after all.
- What a strategy gathers are the codes, and the gathered codes are decoded: fully sharded training moves a quarter of the
  bytes that 16-bit weights take.
- The shardings of codes and scales are derived from the matrix's logical axes. Blocks of numbers that share a scale run along
  `in` and need not end where a shard ends, so scales are whole on that axis; the compiler lays out what is inside a codec.
"""

import abc
import math
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmtune.sharding import on_own_part
from llmtune.weights.contract import contract, expert_contract
from llmtune.weights.gather import gather
from llmtune.weights.operator import Operator
from llmtune.weights.spec import ArraySpec


class Quantized(Operator):
    """Fields are arrays with the leading axes of the stack, [..., rows, out] and the like; none of them trains.

    A subclass says how one matrix is encoded and decoded, and how its fields are declared.
    """

    codes: Any  # [..., rows, out]: the numbers themselves, laid out as the matrix is

    @abc.abstractmethod
    def of(self, matrix: ArraySpec) -> Self:
        """The same format for another matrix, its fields declared."""

    @abc.abstractmethod
    def encode_one(self, matrix: jax.Array) -> Self:
        """[in, out] of any float dtype -> its codes, in the format of this node."""

    @abc.abstractmethod
    def decode_one(self) -> jax.Array:
        """float32 [in, out], where this node holds one matrix."""

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ dense(), decoded in float32 and multiplied in x's dtype."""

        def product(x: jax.Array, stored: Self) -> jax.Array:
            return contract(x, _decoded(stored._gathered(), x.dtype), "io", out_axes)

        return jax.checkpoint(product)(x, self)

    def expert_apply(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """Rows sorted by expert times their own expert's matrix; see `expert_linear`."""

        def product(x: jax.Array, stored: Self) -> jax.Array:
            return expert_contract(x, _decoded(stored._gathered(), x.dtype), group_sizes, out_axes)

        return jax.checkpoint(product)(x, self)

    def dense(self) -> jax.Array:
        """float32 [..., in, out]."""
        return _decoded(self, jnp.float32)

    def encode(self, matrix: jax.Array) -> Self:
        """The codes of [..., in, out], in the format of this node, laid out as the matrix is."""
        if jax.sharding.get_abstract_mesh().empty:
            return _over_leading(lambda own: self.encode_one(own), matrix.ndim - 2)(matrix)
        typed = tuple(jax.typeof(matrix).sharding.spec)
        declared = self.of(ArraySpec(matrix.shape, typed))  # the layout is derived as the declaration is
        specs = jax.tree.map(lambda field: PartitionSpec(*field.axes), declared)
        encode = _over_leading(lambda own: self.encode_one(own), matrix.ndim - 2)
        return jax.sharding.auto_axes(encode, out_sharding=specs)(matrix)  # type: ignore[return-value]

    @property
    def matrix(self) -> ArraySpec:
        """Where the fields are declared: the declaration of the matrix."""
        return ArraySpec(self.shape, self.axes, init=self.codes.init)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Those of the codes."""
        return self.codes.axes

    @property
    def matrix_layout(self) -> Any:
        """Where the fields are shardings: that of the matrix, which is that of its codes."""
        return self.codes

    def _gathered(self) -> Self:
        return jax.tree.map(gather, self)


def _decoded(stored: Quantized, dtype: Any) -> jax.Array:
    """The matrices [..., in, out] in this dtype, laid out as the codes are."""
    decode = _over_leading(lambda own: own.decode_one().astype(dtype), stored.codes.ndim - 2)
    if on_own_part():
        return decode(stored)
    layout = PartitionSpec(*jax.typeof(stored.codes).sharding.spec)
    return jax.sharding.auto_axes(decode, out_sharding=layout)(stored)  # type: ignore[return-value]


def _over_leading(function: Any, axes: int) -> Any:
    """The function of one matrix, for stacks of them."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def has_codes(weight: Any) -> bool:
    """Whether anything in a weight, or in a tree of them, is quantised."""
    leaves = jax.tree.leaves(weight, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return any(isinstance(leaf, Quantized) for leaf in leaves)


def on_another_base(weight: Any, matrix: Any) -> Any:
    """The weight with this matrix in the place of the codes that it stands on: LoRA(NF4, a, b) -> LoRA(matrix, a, b)."""
    return jax.tree.map(
        lambda leaf: matrix if isinstance(leaf, Quantized) else leaf,
        weight,
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )


def rows_of(matrix: ArraySpec, rows: int, dtype: str) -> ArraySpec:
    """The declaration of codes: `rows` of them along the matrix's `in`; they are cut only where the matrix may be, too."""
    (*lead, inner, outer) = matrix.pieces or matrix.shape
    pieces = (*lead, math.gcd(inner, rows), outer)
    return replace(matrix, shape=(*matrix.shape[:-2], rows, matrix.shape[-1]), dtype=dtype, pieces=pieces)


def scales_of(matrix: ArraySpec, rows: int | None, dtype: str) -> ArraySpec:
    """The declaration of scales [..., rows, out] (None: [..., out]), whole along the matrix's `in`."""
    (*lead, _, outer), (*axes, _, out_axis) = matrix.shape, matrix.axes
    middle = () if rows is None else (rows,)
    own_axes = (*axes, *(None for _ in middle), out_axis)
    if matrix.pieces is None:
        return ArraySpec((*lead, *middle, outer), own_axes, dtype=dtype)
    return ArraySpec(
        (*lead, *middle, outer), own_axes, dtype=dtype, pieces=(*matrix.pieces[:-2], *middle, matrix.pieces[-1])
    )
