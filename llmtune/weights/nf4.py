"""NF4: four bits per number, at the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3).

    block of 64 numbers along `in`  -->  16 levels x the block's largest magnitude
    w ~ LEVELS[code] * absmax

Double quantisation keeps the magnitudes in 8 bits: their mean over the matrix is taken off, and what is left goes to a
256-entry dynamic data type in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861, section 2.2). 4.13 bits per number in
all; without it 4.5.

Codes, magnitudes and values are those of bitsandbytes, which flattens a matrix [out, in] row by row, wherever `in` is a
multiple of 64. Where it is not, its blocks run on into the next row; here the last block of each column is filled up with
zeros, so that a block never mixes two outputs.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Self, final

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.kernels.platform import platform
from llmtune.weights.nibbles import look_up, pack, unpack
from llmtune.weights.quantized import Quantized, rows_of, scales_of
from llmtune.weights.spec import ArraySpec

BLOCK, NESTED = 64, 256
LEVELS = np.array(  # quantiles of the normal distribution, zero among them, scaled to [-1, 1] (appendix E of the paper)
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
SMALLEST = float(
    np.finfo(np.float32).tiny
)  # a block of zeros is divided by this; what is smaller counts as zero on devices


def dynamic_levels() -> np.ndarray:
    """The dynamic data type: for each decade below 1 twice as many values as in the one below, both signs, 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = _evenly(2**exponent)
        decade = np.float32(10.0 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*decade, *-decade]
    return np.sort(np.array(values, np.float32))


def _evenly(parts: int) -> np.ndarray:
    """0.1 to 1 in so many parts, float32, in torch's rounding: a rounded step, counted from the nearer end."""
    first, step, count = np.float32(0.1), (np.float32(1) - np.float32(0.1)) / np.float32(parts), np.arange(parts + 1)
    from_below, from_above = np.float64(first) + np.float64(step) * count, 1 - np.float64(step) * (parts - count)
    return np.where(count < (parts + 1) // 2, from_below, from_above).astype(np.float32)


DYNAMIC = dynamic_levels()
ZERO = 127  # DYNAMIC[127 - i] = -DYNAMIC[127 + i], and the 256th value is 1
GRID = 65535  # bitsandbytes finds the nearest dynamic value on a grid of so many steps over [-1, 1]


def grid_thresholds() -> np.ndarray:
    """The first step of the grid that belongs to each dynamic value but the lowest: int32 [255]."""
    grid = (np.arange(GRID + 1, dtype=np.float64) / GRID * 2 - 1).astype(np.float32)
    return np.searchsorted(grid, (DYNAMIC[:-1] + DYNAMIC[1:]) / 2, side="right").astype(np.int32)


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4(Quantized):
    """codes uint8 [..., blocks * 32, out]; see `nibbles` for their order in a block.

    absmax [..., blocks, out]: float32, or with double quantisation uint8 beside `nested` float32 [..., groups], the largest
    magnitude of each group of 256 of them (column by column), and `offset` float32 [...], their mean. `n_in`: rows that count.
    """

    codes: jax.Array
    absmax: jax.Array
    nested: jax.Array | None
    offset: jax.Array | None
    n_in: int = field(metadata={"static": True})

    @classmethod
    def declare(cls, matrix: ArraySpec, *, double: bool = True) -> "NF4":
        """The fields for a matrix [..., in, out]."""
        (*lead, n_in, n_out), (*lead_axes, _, _) = matrix.shape, matrix.axes
        blocks = math.ceil(n_in / BLOCK)
        codes = rows_of(matrix, blocks * BLOCK // 2, "uint8")
        if not double:
            return cls(codes, scales_of(matrix, blocks, "float32"), None, None, n_in)  # type: ignore[arg-type]
        groups = math.ceil(blocks * n_out / NESTED)
        nested: Any = ArraySpec((*lead, groups), (*lead_axes, None))
        offset: Any = ArraySpec(tuple(lead), tuple(lead_axes))
        return cls(codes, scales_of(matrix, blocks, "uint8"), nested, offset, n_in)  # type: ignore[arg-type]

    def of(self, matrix: ArraySpec) -> Self:
        """With or without double quantisation, as here."""
        return self.declare(matrix, double=self.offset is not None)  # type: ignore[return-value]

    def encode_one(self, matrix: jax.Array) -> Self:
        """Each number to the nearest level, halfway down; magnitudes as the module's docstring says."""
        n_in, n_out = matrix.shape
        blocks = math.ceil(n_in / BLOCK)
        padded = jnp.pad(matrix.astype(jnp.float32), ((0, blocks * BLOCK - n_in), (0, 0)))
        numbers = padded.reshape(blocks, BLOCK, n_out)
        absmax = jnp.abs(numbers).max(axis=1)
        scaled = jnp.clip(numbers * (1.0 / jnp.maximum(absmax, SMALLEST))[:, None, :], -1, 1)
        bounds = (LEVELS[:-1] + LEVELS[1:]) / 2
        nearest = jnp.zeros(scaled.shape, jnp.uint8)
        for bound in bounds:
            nearest += (scaled > bound).astype(jnp.uint8)
        codes = pack(nearest.reshape(blocks * BLOCK, n_out), BLOCK)
        if self.offset is None:
            return type(self)(codes, absmax, None, None, n_in)
        quantised, nested, offset = _quantise_magnitudes(absmax)
        return type(self)(codes, quantised, nested, offset, n_in)

    def decode_one(self) -> jax.Array:
        """LEVELS[code] * absmax."""
        absmax = self.absmax
        if self.nested is not None:
            absmax = _magnitudes(self.absmax, self.nested, self.offset)
        numbers = look_up(unpack(self.codes, BLOCK), LEVELS) * absmax[:, None, None, :]
        return numbers.reshape(-1, self.codes.shape[-1])[: self.n_in]

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return (*self.codes.shape[:-2], self.n_in, self.codes.shape[-1])


def _quantise_magnitudes(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 [blocks, out] -> (uint8 [blocks, out], float32 [groups], float32 [])."""
    blocks, n_out = absmax.shape
    offset = absmax.mean()
    rest = _grouped(absmax.T.reshape(-1) - offset)
    nested = jnp.abs(rest).max(axis=1)
    scaled = rest / jnp.maximum(nested, SMALLEST)[:, None]
    steps = jnp.floor((scaled + 1) * (GRID / 2) + 0.5).astype(jnp.int32)
    thresholds = jnp.asarray(grid_thresholds())
    codes = jax.lax.fori_loop(  # one threshold at a time: comparing with all at once would take 255 numbers for each
        0,
        len(thresholds),
        lambda n, code: code + (steps >= thresholds[n]).astype(jnp.uint8),
        jnp.zeros_like(steps, jnp.uint8),
    )
    return codes.reshape(-1)[: blocks * n_out].reshape(n_out, blocks).T, nested, offset


def _magnitudes(codes: jax.Array, nested: jax.Array, offset: Any) -> jax.Array:
    """float32 [blocks, out]. Kept apart from what follows: it is formed once per block, not once per number."""
    blocks, n_out = codes.shape
    each = jnp.broadcast_to(nested[:, None], (len(nested), NESTED)).reshape(-1)[: blocks * n_out]
    values = _dynamic_value(codes.astype(jnp.int32)) * each.reshape(n_out, blocks).T + offset
    return jax.lax.optimization_barrier(values)


def _dynamic_value(codes: jax.Array) -> jax.Array:
    """DYNAMIC[codes]. TPUs select among half of the table, which is its other half negated; elsewhere a gather is cheap."""
    if platform() != "tpu":
        return jnp.asarray(DYNAMIC)[codes]
    magnitude = jnp.abs(codes - ZERO)  # 0 is the value 0, 128 the value 1, which has no opposite
    below = look_up(jnp.minimum(magnitude, ZERO), DYNAMIC[ZERO:-1])
    return jnp.where(codes < ZERO, -below, jnp.where(magnitude > ZERO, 1.0, below))


def _grouped(flat: jax.Array) -> jax.Array:
    """[n] -> [groups, 256], the last one filled up with zeros."""
    return jnp.pad(flat, (0, -flat.shape[0] % NESTED)).reshape(-1, NESTED)
