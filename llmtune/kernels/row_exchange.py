"""Rows that travel to other devices, as many as there are: a ragged all-to-all, inside of `shard_map`.

    counts [from, to]      device 0: rows for 0, for 1, ...      each device's rows stand sorted by where they go
                           device 1: ...
    device i receives      0's rows for i | 1's rows for i | ... | zeros up to `size`

TPUs and NVIDIA GPUs have it as one collective, in which nothing travels but the rows. Elsewhere (simulated devices on a CPU,
whose compiler lacks it) all rows are gathered and each device takes its own: the same numbers.
"""

import jax
import jax.numpy as jnp

from llmtune.kernels.platform import KNOWN, platform


def exchange_rows(rows: jax.Array, counts: jax.Array, axis: str, size: int) -> jax.Array:
    """What this device of the mesh axis receives, [size, width], of rows [n, width] on each; counts int32 [from, to] on all.

    The way back is the same with the counts transposed. `size` is at least what any device can receive.
    """
    me = jax.lax.axis_index(axis)
    sent, received = counts[me], counts[:, me]
    if platform() in KNOWN:
        places = _before(counts, 0)[me]  # where this device's rows begin on each of the others
        empty = jnp.zeros((size, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, empty, _before(sent, 0), sent, places, received, axis_name=axis)
    ends, place = jnp.cumsum(received), jnp.arange(size)
    source = jnp.minimum(jnp.searchsorted(ends, place, side="right"), len(ends) - 1)
    own = _before(counts, 1)[source, me] + place - (ends - received)[source]
    out = jax.lax.all_gather(rows, axis)[source, own]
    return jnp.where((place < ends[-1])[:, None], out, jnp.zeros_like(out))


def _before(counts: jax.Array, axis: int) -> jax.Array:
    """For each entry the sum of those before it along the axis."""
    return jnp.cumsum(counts, axis) - counts
