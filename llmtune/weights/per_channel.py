"""Eight bits per number with one scale per output: Int8 (Dettmers et al. 2022, arXiv:2208.07339, section 2) and Float8.

    W [in, out]  ~  codes [in, out] * scale [out]

    Int8     whole numbers -127..127, rounded to the nearest
    Float8   e4m3 (Micikevicius et al. 2022, arXiv:2209.05433): 4 bits of exponent, 3 of mantissa, up to 448

`stored` is a static field though each class has one value of it: structures of nodes with as many fields compare equal whatever
their classes, and a program compiled for what trains on the one (where both fields are None) would pass for that of the other.

A scale per output comes out of the product: x @ W = (x @ codes) * scale, and codes are exact in bfloat16, so nothing is decoded.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Self, final

import jax
import jax.numpy as jnp

from llmtune.weights.contract import contract
from llmtune.weights.gather import gather
from llmtune.weights.quantized import Quantized, rows_of, scales_of
from llmtune.weights.spec import ArraySpec


@dataclass(frozen=True)
class PerChannel(Quantized):
    """codes [..., in, out], scale float32 [..., out]."""

    codes: jax.Array
    scale: jax.Array

    stored: str = field(default="", metadata={"static": True})  # the dtype of codes
    largest: ClassVar[float]  # code

    @classmethod
    def declare(cls, matrix: ArraySpec) -> Self:
        """The fields for a matrix [..., in, out]."""
        codes, scale = rows_of(matrix, matrix.shape[-2], cls.stored), scales_of(matrix, None, "float32")
        return cls(codes, scale)  # type: ignore[arg-type]

    def of(self, matrix: ArraySpec) -> Self:
        """The same; there is nothing to choose."""
        return self.declare(matrix)

    def encode_one(self, matrix: jax.Array) -> Self:
        """The largest magnitude of each output becomes the largest code."""
        numbers = matrix.astype(jnp.float32)
        scale = jnp.abs(numbers).max(axis=0) / self.largest
        scaled = numbers / jnp.where(scale == 0, 1.0, scale)
        return type(self)(self._rounded(scaled), scale)

    def _rounded(self, scaled: jax.Array) -> jax.Array:
        return scaled.astype(self.stored)

    def decode_one(self) -> jax.Array:
        """Codes * scale."""
        return self.codes.astype(jnp.float32) * self.scale

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """(x @ codes) * scale."""
        product = jax.checkpoint(lambda x, codes: contract(x, gather(codes).astype(x.dtype), "io", out_axes))
        out = product(x, self.codes)
        return (out.astype(jnp.float32) * gather(self.scale)).astype(x.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return tuple(self.codes.shape)


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(PerChannel):
    """Codes int8."""

    stored: str = field(default="int8", metadata={"static": True})
    largest: ClassVar[float] = 127.0

    def _rounded(self, scaled: jax.Array) -> jax.Array:
        return jnp.round(scaled).astype(jnp.int8)


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8(PerChannel):
    """Codes float8_e4m3fn."""

    stored: str = field(default="float8_e4m3fn", metadata={"static": True})
    largest: ClassVar[float] = 448.0
