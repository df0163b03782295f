"""The one place where a strategy decides how a stored weight is gathered before it computes, and its gradient scattered.

    [embed / (data, fsdp), mlp]  --gather over fsdp-->  [embed / data, mlp]  --gather over data-->  [embed, mlp]

Every operator gathers its stored form (codes rather than the floats they decode to), so that fully sharded training moves as
few bytes as the storage allows. A strategy names the mesh axes in the order in which they are gathered, one at a time; the
transpose scatters in the opposite order. One axis of the torus at a time is what the TPU compiler makes reduce-scatters of:
over all chips at once it makes an all-reduce of the whole gradient and cuts a slice, at twice the bytes.

What a gradient flows back through is typed `reduced` over the gathered axes: its cotangent then is `unreduced`, a sum that
every device holds its own part of, and the reduction happens where the gathering is transposed, into shards.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmtune.sharding import current
from llmtune.weights.narrow import narrow

Part = str | tuple[str, ...] | None  # an entry of a PartitionSpec


def gather(w: jax.Array) -> jax.Array:
    """`w` whole on every device that shares it: for small vectors, and for what never trains (codes, scales)."""
    parts = jax.typeof(w).sharding.spec.partitions
    kept = PartitionSpec(*(without(part, current().gather) for part in parts))
    return w if kept == PartitionSpec(*parts) else jax.sharding.reshard(w, kept)


def gather_to_multiply(w: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`w` in `dtype`, gathered to multiply the rows of x: its gradient is scattered back one mesh axis at a time.

    What is added up are the gradients of all the devices that x's rows are spread over: last, and of shards alone, over those
    that do not split w (replicas across slices, say).
    """
    w, rows = narrow(w, dtype), names_of(*jax.typeof(x).sharding.spec.partitions[:-1])
    parts = jax.typeof(w).sharding.spec.partitions
    reduced = rows - names_of(*parts)
    if reduced:
        w = jax.sharding.reshard(w, PartitionSpec(*parts, reduced=frozenset(reduced)))
    for axis in current().gather:
        if axis in names_of(*parts):
            parts, reduced = tuple(without(part, (axis,)) for part in parts), reduced | ({axis} & rows)
            w = jax.sharding.reshard(w, PartitionSpec(*parts, reduced=frozenset(reduced)))
    return w


def gather_inside(w: jax.Array, parts: tuple[Part, ...], *, kept: tuple[str, ...] = ()) -> jax.Array:
    """The same inside `shard_map`: `w` is this device's own part, laid out as `parts` say. It stays split over `kept`."""
    for axis in current().gather:
        if axis in kept:
            continue
        for dimension, part in enumerate(parts):
            if axis in names_of(part):
                w = jax.lax.all_gather(w, axis, axis=dimension, tiled=True)
    return w


def without(part: Part, dropped: tuple[str, ...]) -> Part:
    """The entry of a PartitionSpec with these mesh axes taken out."""
    names = (part,) if isinstance(part, str) else (part or ())
    kept = tuple(name for name in names if name not in dropped)
    return kept[0] if len(kept) == 1 else (kept or None)


def names_of(*parts: Part) -> set[str]:
    """The mesh axes that these entries of a PartitionSpec name."""
    return {name for part in parts for name in ((part,) if isinstance(part, str) else (part or ()))}
