"""Who sees whom in a row: a small static specification, and the one function that gives it meaning.

Causality and windows go by index in the row; segment ids tell documents apart (0 is padding: it sees nothing and nobody sees
it). Every back end follows `visible`; tests hold them against it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Mask:
    """causal: token i sees j <= i; window w: only j > i - w (Mistral's sliding_window).

    packed: a row may hold several documents, or padding anywhere. False is the caller's promise that each row is one
    document from its first token on, padding after it: kernels that take a length per row may then serve. before: so many
    keys stand before the first query, and rows of keys and of segment ids are that much longer than rows of queries.
    """

    causal: bool = True
    window: int | None = None
    packed: bool = True
    before: int = 0


def visible(
    mask: Mask, q_index: jax.Array, kv_index: jax.Array, q_segments: jax.Array, kv_segments: jax.Array
) -> jax.Array:
    """Bool [batch, q, kv] from int32 indices [q], [kv] and segment ids [batch, q], [batch, kv]."""
    seen = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] > 0)
    ahead = q_index[:, None] - kv_index[None, :]
    if mask.causal:
        seen &= ahead >= 0
    if mask.window is not None:
        seen &= ahead < mask.window
    return seen


def tied(masking: Any, to: jax.Array) -> Any:
    """The arrays that a mask is formed from, as if they came out of `to`.

    In a scan over layers JAX computes once, before the scan, all that does not depend on the layer, and keeps it: that would be
    the mask of every head and every block, the [seq, seq] that the blocks are there to avoid.
    """
    return jax.lax.optimization_barrier((masking, to[(0,) * to.ndim]))[0]


def visible_blocks(mask: Mask, q_length: int, kv_length: int, block: int) -> np.ndarray:
    """int32 [pairs, 2]: the (query block, key block) pairs in which indices alone leave anything to see.

    `mask.before` is a multiple of the block.
    """
    q_blocks, kv_blocks = -(-q_length // block), -(-kv_length // block)
    i, j = np.meshgrid(np.arange(q_blocks), np.arange(kv_blocks), indexing="ij")
    seen, at = np.ones(i.shape, bool), i + mask.before // block
    if mask.causal:
        seen &= j <= at
    if mask.window is not None:  # the nearest pair of indices is less than a window apart
        seen &= (at * block) - (j * block + block - 1) < mask.window
    return np.stack([i[seen], j[seen]], axis=1).astype(np.int32)


def no_gradients(*integers: Any) -> tuple[Any, ...]:
    """What stands for the gradients of integers: of segment ids, and of what says which weights are dropped."""
    return jax.tree.map(lambda own: np.zeros(jnp.shape(own), jax.dtypes.float0), integers)
