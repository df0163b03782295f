"""The one place where a strategy decides how a stored weight is gathered before it computes.

Every operator calls `gather` on its stored form (codes rather than the floats they decode to), so that fully sharded
training moves as few bytes as the storage allows. The transpose of gathering is the reduction of the gradient back to shards.
"""

import jax
from jax.sharding import PartitionSpec

from llmtune.sharding import current


def gather(w: jax.Array) -> jax.Array:
    """`w` with the mesh axes that the current strategy gathers over removed from its typed sharding."""
    dropped = set(current().gather)
    if not dropped:
        return w
    typed = jax.typeof(w).sharding.spec
    kept = PartitionSpec(*(_without(part, dropped) for part in typed))
    return w if kept == typed else jax.sharding.reshard(w, kept)


def _without(part: str | tuple[str, ...] | None, dropped: set[str]) -> str | tuple[str, ...] | None:
    names = (part,) if isinstance(part, str) else (part or ())
    kept = tuple(name for name in names if name not in dropped)
    return kept[0] if len(kept) == 1 else (kept or None)
