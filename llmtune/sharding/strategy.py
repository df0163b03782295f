"""A sharding strategy is a table from logical axis to mesh axis.

    configs/strategies/fsdp.yaml   {batch: fsdp, embed: fsdp}
    ("layers", "embed", "mlp")  -->  PartitionSpec(None, "fsdp", None)

Modules name the logical axes of their weights and activations; only this table knows the mesh. A strategy is closed over by
a step and *entered inside the traced function* (`with strategy.active(): ...`), so a compiled step can never be run under a
table other than the one it was traced with. Logical axes that the table does not name are not sharded.

Weights:      layers, expert, vocab, embed, heads, kv_heads, mlp, rank
Activations:  batch, seq, residual_seq, act_embed, act_heads, act_kv_heads, act_mlp, act_vocab, act_rank

`residual_seq` is the sequence of what runs between blocks, beside attention and MLP; `seq` is that within them. Code may also
say `rows`: batch and sequence as one, split over the axes of both.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from jax.sharding import Mesh, PartitionSpec

MeshAxes = tuple[str, ...]
MESH_AXES = ("replica", "data", "fsdp", "context", "expert", "tensor")  # the slowest links first


LOGICAL_AXES = (
    *("layers", "expert", "vocab", "embed", "heads", "kv_heads", "mlp", "rank"),
    *("batch", "seq", "residual_seq", "act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab", "act_rank"),
)


class ShardingError(ValueError):
    """A layout that does not fit: the tensor, its axis, the mesh axis, and which sizes would."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: a step is compiled for this very table
class Strategy:
    """`axes`: logical axis -> mesh axes it is split over.

    `gather`: mesh axes over which weights are gathered before use, in this order, one at a time; `state`: what the optimizer's
    state is split over besides (logical axis -> mesh axes); `about`: one line for people who choose among strategies.
    """

    name: str
    axes: Mapping[str, MeshAxes] = field(default_factory=dict)
    gather: MeshAxes = ()
    state: Mapping[str, MeshAxes] = field(default_factory=dict)
    about: str = ""

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The mesh axes that the table uses."""
        used = {name for table in (self.axes, self.state) for part in table.values() for name in part}
        return tuple(axis for axis in MESH_AXES if axis in used)

    def on(self, mesh: Mesh) -> "Strategy":
        """The table for this mesh: axes of one device split nothing, and are left out.

        Raises ShardingError where the mesh has devices along an axis that the table does not use.
        """
        idle = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in self.mesh_axes]
        if idle:
            raise ShardingError(
                f"sharding.mesh: {idle[0]} has {mesh.shape[idle[0]]} devices, and strategy {self.name} splits nothing over it; "
                f"its axes are {', '.join(self.mesh_axes) or 'none'}"
            )

        def own(part: MeshAxes) -> MeshAxes:
            return tuple(axis for axis in part if mesh.shape[axis] > 1)

        axes, state = ({name: own(part) for name, part in table.items()} for table in (self.axes, self.state))
        return replace(self, axes=axes, gather=own(self.gather), state=state)

    def whole_rows(self) -> "Strategy":
        """The table without the axes that cut rows along the sequence: for decoding, and for rows of any length."""
        return replace(self, axes={name: own for name, own in self.axes.items() if name not in ("seq", "residual_seq")})

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The partition spec of an array whose dimensions carry these logical axes (None: not sharded)."""
        return self._spec(self.axes, logical)

    def state_spec(self, *logical: str | None) -> PartitionSpec:
        """That of the optimizer's state of a weight with these logical axes."""
        return self._spec(
            {**self.axes, **{name: (*self.axes.get(name, ()), *own) for name, own in self.state.items()}}, logical
        )

    def _spec(self, axes: Mapping[str, MeshAxes], logical: tuple[str | None, ...]) -> PartitionSpec:
        rows = (*axes.get("batch", ()), *axes.get("seq", ()))
        parts = [rows if axis == "rows" else axes.get(axis, ()) if axis else () for axis in logical]
        used = [mesh_axis for part in parts for mesh_axis in part]
        if len(set(used)) != len(used):
            raise ShardingError(
                f"strategy {self.name}: the axes {_named(logical)} of one tensor are split over the same mesh axis twice "
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
    """A strategy from the content of its YAML file: `about`, `axes`, `gather` and `state` (see `Strategy`)."""
    unknown = set(table) - {"about", "axes", "gather", "state"}
    if unknown:
        raise ShardingError(
            f"strategy {name}: unknown key {sorted(unknown)[0]!r}; a strategy has `about`, `axes`, `gather` and `state`"
        )
    axes, state = (_table(name, key, table.get(key) or {}) for key in ("axes", "state"))
    return Strategy(name, axes, _mesh_axes(name, table.get("gather")), state, str(table.get("about") or "").strip())


def _named(logical: tuple[str | None, ...]) -> str:
    """As a table names them: `rows` are those of the batch, cut along the sequence."""
    named = (("batch", "seq") if axis == "rows" else (axis,) for axis in logical if axis)
    return ", ".join(str(axis) for part in named for axis in part)


def _table(name: str, key: str, table: object) -> dict[str, MeshAxes]:
    if not isinstance(table, Mapping):
        raise ShardingError(f"strategy {name}: `{key}` must map logical axes to mesh axes, got {table!r}")
    unknown = sorted(str(axis) for axis in table if axis not in LOGICAL_AXES)
    if unknown:
        raise ShardingError(
            f"strategy {name}: {key}: unknown logical axis {unknown[0]!r}; there are {', '.join(LOGICAL_AXES)}"
        )
    return {str(axis): _mesh_axes(name, part) for axis, part in table.items()}


def load_strategy(name: str, directory: Path) -> Strategy:
    """The strategy `name` from `directory` (configs/strategies), or from a YAML file given by its path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else directory / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in directory.glob("*.yaml")))
        raise ShardingError(f"sharding.strategy: no strategy {name!r}; known: {known}, or the path of a YAML file")
    return strategy_from_table(path.stem, _read_table(path))


def _read_table(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
        node, table = yaml.compose(text), yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ShardingError(f"{path}: not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise ShardingError(f"{path}: {line}not valid YAML ({problem or type(error).__name__})") from None
    if table is None:
        raise ShardingError(f"{path}: empty; a strategy has `about`, `axes`, `gather` and `state`")
    if not isinstance(table, dict):
        raise ShardingError(f"{path}: a mapping is expected; a strategy has `about`, `axes`, `gather` and `state`")
    for twice in _keys_given_twice(node):
        raise ShardingError(f"{path}: the key {twice!r} stands twice; remove one of them")
    return table


def _keys_given_twice(node: yaml.Node | None) -> Iterator[str]:
    """Those of a mapping and of the mappings in it, of which YAML would take the last without a word."""
    if isinstance(node, yaml.MappingNode):
        names = [name.value for name, _ in node.value]
        yield from (name for place, name in enumerate(names) if name in names[:place])
        for _, inner in node.value:
            yield from _keys_given_twice(inner)


def _mesh_axes(name: str, value: object) -> MeshAxes:
    match value:
        case None:
            return ()
        case str():
            given: MeshAxes = (value,)
        case list() if all(isinstance(v, str) for v in value):
            given = tuple(value)
        case _:
            raise ShardingError(f"strategy {name}: {value!r} is not a mesh axis or a list of mesh axes")
    unknown = [axis for axis in given if axis not in MESH_AXES]
    if unknown:
        raise ShardingError(f"strategy {name}: unknown mesh axis {unknown[0]!r}; the axes are {', '.join(MESH_AXES)}")
    if len(set(given)) < len(given):
        raise ShardingError(
            f"strategy {name}: {list(given)} names a mesh axis twice; what is split over it is split once"
        )
    return given
