"""One declaration of an array: shape, dtype, logical axes and initialiser. Everything else is a `tree.map` over it.

Modules declare their parameters as `ArraySpec` leaves, transforms map trees of them exactly as they map trees of arrays, and
from one such tree follow the shardings, the memory, the random initial values and the layout of checkpoints.

    {"kernel": ArraySpec([4096, 14336], axes=("embed", "mlp"))}
      --lora-->       {"kernel": LoRA(base=ArraySpec(...), a=ArraySpec([4096, 16], ("embed", "rank")), ...)}
      --shardings-->  {"kernel": LoRA(base=NamedSharding(...), a=NamedSharding(...), ...)}
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmtune.sharding import Strategy, put, sharding_for

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (key, shape, dtype) -> array


def normal(stddev: float) -> Initializer:
    """Gaussian with this standard deviation."""
    return lambda key, shape, dtype: (stddev * jax.random.normal(key, shape)).astype(dtype)


def uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)


def constant(value: float) -> Initializer:
    """Every element is `value`."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@dataclass(frozen=True)
class ArraySpec:
    """An array that is declared, not held. `axes` names each dimension's logical axis (None: never sharded).

    `init` draws its first value, or is that value where it was read from somewhere. `pieces`: what each dimension consists of
    where its elements belong together (heads are not cut); None: single elements.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer | np.ndarray = constant(0.0)
    dtype: str = "float32"
    pieces: tuple[int, ...] | None = None

    def stacked(self, layers: int) -> "ArraySpec":
        """The same array for each of `layers` layers, under a leading `layers` axis."""
        pieces = None if self.pieces is None else (layers, *self.pieces)
        return replace(self, shape=(layers, *self.shape), axes=("layers", *self.axes), pieces=pieces)


def shardings(specs: Any, mesh: Mesh, strategy: Strategy) -> Any:
    """The NamedSharding of every declared array; raises ShardingError naming the first that does not divide."""
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: sharding_for(spec.pieces or spec.shape, spec.axes, mesh, strategy, name=path_name(path)),
        specs,
    )


def materialize(specs: Any, key: jax.Array, mesh: Mesh, strategy: Strategy) -> Any:
    """Initial values straight into their shardings.

    Each array draws from the key folded with its own path, so that its values depend neither on the mesh nor on what
    else the tree holds.
    """

    layouts = shardings(specs, mesh, strategy)

    def draw(path, spec: ArraySpec) -> jax.Array | None:
        if isinstance(spec.init, np.ndarray):
            return None
        return spec.init(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), spec.shape, spec.dtype)

    def place(spec: ArraySpec, layout: NamedSharding) -> jax.Array | None:
        if not isinstance(spec.init, np.ndarray):
            return None
        return put(spec.init.astype(spec.dtype), layout)

    given = jax.tree.map(place, specs, layouts)
    drawn_layouts = jax.tree.map(
        lambda spec, layout: None if isinstance(spec.init, np.ndarray) else layout, specs, layouts
    )
    drawn = jax.jit(lambda: jax.tree_util.tree_map_with_path(draw, specs), out_shardings=drawn_layouts)()
    return jax.tree.map(lambda d, g: g if d is None else d, drawn, given, is_leaf=lambda leaf: leaf is None)


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/0/attention/q/kernel/a`: the name of a leaf in messages, checkpoints and rules."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
