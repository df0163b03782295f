"""A vocabulary of another size, as a transform of the two weights that have an axis for it.

    embed/table [V, hidden]   -->  [V', hidden]      rows of tokens stay as they are, bit by bit; the others are new
    head/kernel [hidden, V]   -->  [hidden, V']      where the head is not tied

A new row is the mean of the old ones plus a little noise. With the mean, no new token is likelier than an average one, so
that the distribution over the old tokens hardly moves; a row drawn as for a fresh model has logit 0, where trained models put
all tokens they mean far below, and takes nearly all the probability (Hewitt 2021, "Initializing New Word Embeddings for
Pretrained Language Models"). He draws around the mean with a covariance of 1e-5 that of the old rows; here only its
diagonal is used, which needs no [hidden, hidden] factorisation and is laid out as the table is.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.sharding import placed_by_compiler
from llmtune.transforms.select import EMBEDDING, HEAD, weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, normal, path_name

AXES = {EMBEDDING: ("vocab", "embed"), HEAD: ("embed", "vocab")}
NOISE = 1e-5**0.5  # in standard deviations of the old rows


def resize_vocabulary(*, tokens: int, size: int) -> Transform:
    """The first `tokens` rows as they are, then `size - tokens` new ones (none: the table is cut).

    Apply it to arrays under an active strategy: the result is laid out as that says for `vocab` and `embed`, which must
    divide. What goes in may be laid out in any way.
    """

    def init(declared: Params) -> dict[str, ArraySpec]:
        weights = weights_by_path(declared)
        return {path: _noise(path, weights[path], size - tokens) for path in AXES if path in weights and size > tokens}

    def apply(params: Params, noise: Mapping[str, Any]) -> Params:
        def resize(path: tuple[Any, ...], weight: Any) -> Any:
            name = path_name(path)
            if name not in AXES:
                return weight
            if isinstance(weight, ArraySpec):
                return replace(weight, shape=_shape(name, weight, size))
            given = (weight, noise[name]) if name in noise else (weight,)
            grow = functools.partial(_resize, axis=AXES[name].index("vocab"), tokens=tokens)
            return placed_by_compiler(grow, *AXES[name])(*given)

        return jax.tree_util.tree_map_with_path(resize, params)

    return Transform(init, apply)


def without_vocabulary_axis(declared: Params) -> Params:
    """The same declarations, the vocabulary not sharded: a size that is about to change need not divide."""

    def change(spec: ArraySpec) -> ArraySpec:
        return replace(spec, axes=tuple(None if axis == "vocab" else axis for axis in spec.axes))

    return jax.tree.map(change, declared)


def _noise(path: str, weight: ArraySpec, rows: int) -> ArraySpec:
    axes = tuple(None if axis == "vocab" else axis for axis in AXES[path])
    return ArraySpec(_shape(path, weight, rows), axes, init=normal(1.0))


def _shape(path: str, weight: ArraySpec, size: int) -> tuple[int, ...]:
    return tuple(size if axis == "vocab" else n for n, axis in zip(weight.shape, AXES[path], strict=True))


def _resize(weight: jax.Array, noise: jax.Array | None = None, *, axis: int, tokens: int) -> jax.Array:
    old = jax.lax.slice_in_dim(weight, 0, tokens, axis=axis)
    if noise is None:
        return old
    wide = old.astype(jnp.float32)
    mean, spread = wide.mean(axis, keepdims=True), wide.std(axis, keepdims=True)
    return jnp.concatenate([old, (mean + NOISE * spread * noise).astype(weight.dtype)], axis)
