"""Int4: four bits per number, evenly spaced, one scale per group of 128 along `in` (Frantar et al. 2022, arXiv:2210.17323, 4).

    w ~ (code - 8) * scale        codes 1..15, so that -scale * 7 and scale * 7 are the ends; 4.25 bits per number

The last group of a column is filled up with zeros where 128 does not divide `in`.
"""

import math
from dataclasses import dataclass, field
from typing import Self, final

import jax
import jax.numpy as jnp

from llmtune.weights.nibbles import pack, unpack
from llmtune.weights.quantized import Quantized, rows_of, scales_of
from llmtune.weights.spec import ArraySpec

GROUP, MIDDLE, LARGEST = 128, 8, 7


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4(Quantized):
    """codes uint8 [..., groups * 64, out] (see `nibbles`), scale float32 [..., groups, out]. `n_in`: rows that count."""

    codes: jax.Array
    scale: jax.Array
    n_in: int = field(metadata={"static": True})

    @classmethod
    def declare(cls, matrix: ArraySpec) -> "Int4":
        """The fields for a matrix [..., in, out]."""
        n_in = matrix.shape[-2]
        groups = math.ceil(n_in / GROUP)
        codes = rows_of(matrix, groups * GROUP // 2, "uint8")
        return cls(codes, scales_of(matrix, groups, "float32"), n_in)  # type: ignore[arg-type]

    def of(self, matrix: ArraySpec) -> Self:
        """The same; there is nothing to choose."""
        return self.declare(matrix)  # type: ignore[return-value]

    def encode_one(self, matrix: jax.Array) -> Self:
        """The largest magnitude of each group becomes 7 steps; each number goes to the nearest."""
        n_in, n_out = matrix.shape
        groups = math.ceil(n_in / GROUP)
        padded = jnp.pad(matrix.astype(jnp.float32), ((0, groups * GROUP - n_in), (0, 0)))
        numbers = padded.reshape(groups, GROUP, n_out)
        scale = jnp.abs(numbers).max(axis=1) / LARGEST
        steps = jnp.round(numbers / jnp.where(scale == 0, 1.0, scale)[:, None, :])
        codes = (steps + MIDDLE).astype(jnp.uint8).reshape(groups * GROUP, n_out)
        return type(self)(pack(codes, GROUP), scale, n_in)

    def decode_one(self) -> jax.Array:
        """(code - 8) * scale."""
        steps = (unpack(self.codes, GROUP) - MIDDLE).astype(jnp.float32)
        return (steps * self.scale[:, None, None, :]).reshape(-1, self.codes.shape[-1])[: self.n_in]

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return (*self.codes.shape[:-2], self.n_in, self.codes.shape[-1])
