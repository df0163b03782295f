"""Rows of a table that is spread over devices: the rows travel, the table stays.

    table [vocab / tensor, embed / fsdp], ids [batch / fsdp, seq]

    ids      gathered over fsdp: every device looks up its own columns of the rows that all ask for
    rows     [batch, seq, embed / fsdp]  --all-to-all-->  [batch / fsdp, seq, embed]
    vocab    a device whose part of the table lacks an id adds zeros to the sum over `tensor`

Gathering the table would move and hold [vocab, embed] for the sake of a few thousand rows (1.05 GB for Llama 3 8B in bfloat16,
and again for its gradient, against 34 MB of rows for 4,096 tokens). The transpose takes gradients of rows the same way back:
each device adds up the columns it owns, and nothing of the table's size is exchanged.
"""

import functools

import jax
import jax.numpy as jnp

from llmtune.sharding import spec

Part = str | tuple[str, ...] | None


def take_rows(ids: jax.Array, table: jax.Array) -> jax.Array:
    """int32 [batch, seq], [vocab, embed] -> [batch, seq, embed] in the table's dtype; ids beyond the table are clipped."""
    asked, stored = (jax.typeof(array).sharding.spec.partitions for array in (ids, table))
    out = spec("batch", "seq", "act_embed")
    own = functools.partial(_own_rows, vocab=table.shape[0], asked=asked, stored=stored, out=out.partitions)
    specs = jax.sharding.PartitionSpec(*asked), jax.sharding.PartitionSpec(*stored)
    return jax.shard_map(own, in_specs=specs, out_specs=out, check_vma=False)(ids, table)


def _own_rows(
    ids: jax.Array,
    table: jax.Array,
    *,
    vocab: int,
    asked: tuple[Part, ...],
    stored: tuple[Part, ...],
    out: tuple[Part, ...],
) -> jax.Array:
    """What one device does: its ids, its part of the table -> its part of the rows."""
    (batch, seq), (in_vocab, in_embed) = (tuple(map(_axes, parts)) for parts in (asked, stored))
    exchanged = [tuple(a for a in in_embed if a in rows_axes) for rows_axes in (batch, seq)]
    for dimension, axes in enumerate(exchanged):
        ids = jax.lax.all_gather(ids, axes, axis=dimension, tiled=True) if axes else ids
    ids = jnp.clip(ids, 0, vocab - 1)
    if in_vocab:
        local = ids - jax.lax.axis_index(in_vocab) * len(table)
        held = (local >= 0) & (local < len(table))
        rows = jnp.where(held[..., None], table[jnp.where(held, local, 0)], 0)
        rows = jax.lax.psum(rows, in_vocab)
    else:
        rows = table[ids]
    for dimension, axes in reversed([*enumerate(exchanged)]):  # columns are in the order (of batch, of seq)
        rows = jax.lax.all_to_all(rows, axes, dimension, 2, tiled=True) if axes else rows
    rest = tuple(a for a in in_embed if a not in (*batch, *seq, *_axes(out[2])))
    return jax.lax.all_gather(rows, rest, axis=2, tiled=True) if rest else rows


def _axes(part: Part) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else (part or ())
