"""A sharding strategy is a table from logical axis to mesh axis.

    configs/strategies/fsdp.yaml   {batch: fsdp, embed: fsdp}
    ("layers", "embed", "mlp")  -->  PartitionSpec(None, "fsdp", None)

Modules name the logical axes of their weights and activations; only this table knows the mesh. A strategy is closed over by
a step and *entered inside the traced function* (`with strategy.active(): ...`), so a compiled step can never be run under a
table other than the one it was traced with. Logical axes that the table does not name are not sharded.

Weights:      layers, expert, vocab, embed, heads, kv_heads, mlp, rank
Activations:  batch, seq, act_embed, act_heads, act_kv_heads, act_mlp, act_vocab, act_rank
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jax.sharding import PartitionSpec

MeshAxes = tuple[str, ...]


class ShardingError(ValueError):
    """A layout that does not fit: the tensor, its axis, the mesh axis, and which sizes would."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: a step is compiled for this very table
class Strategy:
    """`axes`: logical axis -> mesh axes it is split over; `gather`: mesh axes over which weights are gathered before use."""

    name: str
    axes: Mapping[str, MeshAxes] = field(default_factory=dict)
    gather: MeshAxes = ()

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The partition spec of an array whose dimensions carry these logical axes (None: not sharded)."""
        parts = [self.axes.get(axis, ()) if axis else () for axis in logical]
        used = [mesh_axis for part in parts for mesh_axis in part]
        if len(set(used)) != len(used):
            raise ShardingError(
                f"strategy {self.name}: the axes {logical} of one tensor are split over the same mesh axis twice "
                f"({', '.join(sorted({a for a in used if used.count(a) > 1}))}); map one of them to another mesh axis"
            )
        return PartitionSpec(*(part[0] if len(part) == 1 else (part or None) for part in parts))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make `spec(...)` of this module speak for this strategy. Enter it inside the function that is traced."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


REPLICATED = Strategy("replicated")
_ACTIVE: contextvars.ContextVar[Strategy] = contextvars.ContextVar("strategy", default=REPLICATED)


def current() -> Strategy:
    """The strategy entered by the function that is being traced."""
    return _ACTIVE.get()


def spec(*logical: str | None) -> PartitionSpec:
    """`current().spec(...)`: what model code calls."""
    return current().spec(*logical)


def strategy_from_table(name: str, table: Mapping[str, object]) -> Strategy:
    """A strategy from the content of its YAML file: `axes` (logical axis -> mesh axis or list of them) and `gather`."""
    unknown = set(table) - {"axes", "gather"}
    if unknown:
        raise ShardingError(f"strategy {name}: unknown key {sorted(unknown)[0]!r}; a strategy has `axes` and `gather`")
    axes = table.get("axes") or {}
    if not isinstance(axes, Mapping):
        raise ShardingError(f"strategy {name}: `axes` must map logical axes to mesh axes, got {axes!r}")
    return Strategy(name, {str(k): _mesh_axes(name, v) for k, v in axes.items()}, _mesh_axes(name, table.get("gather")))


def load_strategy(name: str, directory: Path) -> Strategy:
    """The strategy `name` from `directory` (configs/strategies), or from a YAML file given by its path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else directory / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in directory.glob("*.yaml")))
        raise ShardingError(f"sharding.strategy: no strategy {name!r}; known: {known}, or the path of a YAML file")
    return strategy_from_table(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")) or {})


def _mesh_axes(name: str, value: object) -> MeshAxes:
    match value:
        case None:
            return ()
        case str():
            return (value,)
        case list() if all(isinstance(v, str) for v in value):
            return tuple(value)
    raise ShardingError(f"strategy {name}: {value!r} is not a mesh axis or a list of mesh axes")
