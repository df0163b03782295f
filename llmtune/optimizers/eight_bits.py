"""Moments in 8 bits: block-wise dynamic quantisation (Dettmers et al. 2022, arXiv:2110.02861, section 2).

    values [..., in, out]  -->  codes uint8, of the same shape and layout,  scales float32 [..., in / rows, out / columns]

A block is a tile of up to 256 numbers, as wide as the last axis allows, and its scale is its largest magnitude. A code stands
for a number in [-1, 1] whose decimal exponent takes the fewer bits the larger it is. The table of 256 numbers is computed, not
looked up: gathers of single numbers are slow on TPUs.

    signed      0 and 7 decades of 1, 2, 4, .. 64 numbers on either side, and 1
    unsigned    0 and 7 decades of 2, 4, 8, .. 128 numbers, and 1
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BLOCK = 256
DECADES = 7


class Blocks(NamedTuple):
    """Codes uint8 of the values' shape; scales float32, one for each tile."""

    codes: jax.Array
    scales: jax.Array


def tile(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a block of [..., in, out]: the last axis first, each the largest divisor that keeps within 256."""
    columns = _divisor(shape[-1], BLOCK)
    return _divisor(shape[-2], BLOCK // columns), columns


def scale_layout(layout: PartitionSpec, shape: tuple[int, ...], axis_size: dict[str, int]) -> PartitionSpec:
    """Scales lie as the values do, but whole on an axis that their number does not divide."""
    numbers = tuple(size // piece for size, piece in zip(shape[-2:], tile(shape), strict=True))
    parts = [*layout, *(None,) * (len(shape) - len(layout))]
    for axis, number in zip((-2, -1), numbers, strict=True):
        names = (parts[axis],) if isinstance(parts[axis], str) else parts[axis] or ()
        ways = 1
        for name in names:
            ways *= axis_size[name]
        parts[axis] = parts[axis] if number % ways == 0 else None
    return PartitionSpec(*parts)


def encode(values: jax.Array, *, signed: bool) -> Blocks:
    """The nearest code of every value, in units of the largest magnitude of its block."""
    blocks = _split(values)
    scales = jnp.abs(blocks).max((-3, -1), keepdims=True)
    codes = _nearest(blocks / jnp.where(scales > 0, scales, 1.0), signed)
    return Blocks(codes.reshape(values.shape), scales[..., 0, :, 0])


def decode(blocks: Blocks, *, signed: bool) -> jax.Array:
    """The values that they stand for, float32."""
    values = _split(_number(blocks.codes, signed)) * blocks.scales[..., None, :, None]
    return values.reshape(blocks.codes.shape)


def zero_code(signed: bool) -> int:
    """The code of 0."""
    return 127 if signed else 0


def _split(values: jax.Array) -> jax.Array:
    """[..., in, out] -> [..., in / rows, rows, out / columns, columns]."""
    *outer, inner, last = values.shape
    rows, columns = tile(values.shape)
    return values.reshape(*outer, inner // rows, rows, last // columns, columns)


def _number(codes: jax.Array, signed: bool) -> jax.Array:
    """The number in [-1, 1] of each code."""
    place = codes.astype(jnp.int32) - zero_code(signed)
    return jnp.where(place < 0, -1.0, 1.0) * _magnitude(jnp.abs(place), signed)


def _magnitude(place: jax.Array, signed: bool) -> jax.Array:
    """Place 0 is 0, the last one 1; between them decade d holds places 2^d .. 2^(d+1) - 1, the unsigned one twice as many."""
    first = 1 if signed else 2
    index = jnp.maximum(place + first - 1, 1)  # unsigned: places 1, 2 are the first decade, then 3 .. 6
    bits = 31 - jax.lax.clz(index)
    decade = bits - (0 if signed else 1)
    within = index - (1 << bits)
    fraction = 0.1 + 0.9 * (within.astype(jnp.float32) + 0.5) / (1 << bits).astype(jnp.float32)
    value = fraction * _power_of_ten(decade)
    value = jnp.where(decade >= DECADES, 1.0, value)
    return jnp.where(place == 0, 0.0, value)


def _nearest(values: jax.Array, signed: bool) -> jax.Array:
    """The code of each value in [-1, 1]: the place of its cell, and of its neighbours the nearest."""
    magnitude = jnp.abs(values)
    decade = sum(((magnitude >= 10.0 ** (d - DECADES)).astype(jnp.int32) for d in range(1, DECADES)), jnp.int32(0))
    first = 1 if signed else 2
    cells = (first << decade).astype(jnp.float32)
    within = jnp.floor((magnitude / _power_of_ten(decade) - 0.1) / 0.9 * cells)
    place = (first << decade) + jnp.clip(within, 0, cells - 1).astype(jnp.int32) - first + 1
    last = 128 if signed else 255
    below, own, above = (_magnitude(jnp.clip(place + step, 0, last), signed) for step in (-1, 0, 1))
    place = jnp.where(
        magnitude < (below + own) / 2, place - 1, jnp.where(magnitude > (own + above) / 2, place + 1, place)
    )
    place = jnp.clip(place, 0, last)
    if not signed:
        return place.astype(jnp.uint8)
    return jnp.where(values < 0, 127 - jnp.minimum(place, 127), 127 + place).astype(jnp.uint8)


def _power_of_ten(decade: jax.Array) -> jax.Array:
    """10^(decade - 6), exactly as a float32 is nearest to it."""
    value = jnp.float32(1.0)
    for d in range(DECADES - 1):
        value = jnp.where(decade == d, jnp.float32(10.0 ** (d - DECADES + 1)), value)
    return value


def _divisor(size: int, limit: int) -> int:
    return max(d for d in range(1, min(size, limit) + 1) if size % d == 0)
