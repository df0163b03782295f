"""Four bits per number: two to a byte, and tables looked up by comparing instead of gathering.

    numbers 0..15 [rows, out], blocks of 64 rows   --pack-->    bytes [rows / 2, out]

A byte holds row r of a block above row r + half a block: what is unpacked is a broadcast and a shift, whose result is in
order. (Neighbours in one byte would be interleaved on the way out, which TPUs do by moving rows about.)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def pack(numbers: jax.Array, block: int) -> jax.Array:
    """uint8 [rows, out] below 16, rows a multiple of `block` -> uint8 [rows / 2, out]."""
    rows, out = numbers.shape
    halves = numbers.reshape(rows // block, 2, block // 2, out)
    return ((halves[:, 0] << 4) | halves[:, 1]).reshape(rows // 2, out)


def unpack(codes: jax.Array, block: int) -> jax.Array:
    """The inverse of `pack`, by blocks: uint8 [rows / 2, out] -> int32 [rows / block, 2, block / 2, out]."""
    rows, out = codes.shape
    halves = codes.reshape(2 * rows // block, 1, block // 2, out).astype(jnp.int32)
    shift = jnp.asarray([4, 0], jnp.int32).reshape(1, 2, 1, 1)
    return (halves >> shift) & 15


def look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """float32 `table[codes]`, for int32 codes below the table's length, a power of two: a tree of selections, bit by bit.

    A gather of single numbers is slow on every platform; 15 selections are a few vector instructions.
    """
    branches: Sequence[jax.Array | np.ndarray] = list(np.asarray(table, np.float32))
    bit = 0
    while len(branches) > 1:
        chosen = (codes & (1 << bit)) != 0
        branches = [jnp.where(chosen, odd, even) for even, odd in zip(branches[::2], branches[1::2], strict=True)]
        bit += 1
    return jnp.asarray(branches[0])
