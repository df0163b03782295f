"""Adafactor: second moments as the product of their row and column means (Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4).

    V ~ (R C) / mean(R)      R [in, 1] and C [1, out] in place of V [in, out]
    U = G / sqrt(V),  divided by max(1, rms(U) / clip_threshold)
    step = learning rate * max(1e-3, rms(weights)) * U, where `scale_by_size` follows

The layer and expert axes of a stacked weight are batch axes: means and root mean squares are those of one matrix. There is no
first moment. Vectors keep their whole second moment.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmtune.optimizers.paths import batch_axes
from llmtune.weights import path_name

TINY = 1e-30  # the paper's epsilon 1, added to squared gradients
SMALLEST_RMS = 1e-3  # the paper's epsilon 2: weights that begin at zero still move


class Factored(NamedTuple):
    """Of a matrix: `rows` [..., in, 1], `columns` [..., 1, out]; of a vector: `rows` is its whole second moment."""

    rows: jax.Array
    columns: jax.Array | None


class AdafactorState(NamedTuple):
    """`count`: updates done; `moments`: a `Factored` for each leaf."""

    count: jax.Array
    moments: Any


def scale_by_adafactor(*, decay_exponent: float, clip_threshold: float) -> optax.GradientTransformation:
    """Gradients -> updates whose rms is `clip_threshold` at most; float32 state."""

    def init(params: Any) -> AdafactorState:
        zeros = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _squares(path_name(path), jnp.zeros(leaf.shape, jnp.float32, device=_of(leaf))), params
        )
        return AdafactorState(jnp.zeros((), jnp.int32), zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        fresh = count.astype(jnp.float32) ** -decay_exponent

        def moments(path: tuple[Any, ...], grad: jax.Array, old: Factored) -> Factored:
            squares = _squares(path_name(path), jnp.square(grad.astype(jnp.float32)) + TINY)
            return jax.tree.map(lambda old, new: (1 - fresh) * old + fresh * new, old, squares)

        def scaled(path: tuple[Any, ...], grad: jax.Array, own: Factored) -> jax.Array:
            whole = jax.lax.rsqrt(own.rows)
            if own.columns is not None:
                whole = jax.lax.rsqrt(own.rows / own.rows.mean(-2, keepdims=True)) * jax.lax.rsqrt(own.columns)
            direction = grad * whole
            return direction / jnp.maximum(1.0, _rms(path, direction) / clip_threshold)

        walk = jax.tree_util.tree_map_with_path
        new = walk(moments, updates, state.moments)
        return walk(scaled, updates, new), AdafactorState(count, new)

    return optax.GradientTransformation(init, update)


def scale_by_size() -> optax.GradientTransformation:
    """Updates in units of the weight's own root mean square: what is multiplied in beside the learning rate."""

    def scale(path: tuple[Any, ...], update: jax.Array, leaf: jax.Array) -> jax.Array:
        return update * jnp.maximum(SMALLEST_RMS, _rms(path, leaf))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params))


def _squares(path: str, squares: jax.Array) -> Factored:
    """The row and column means of squared gradients, or the squares themselves where they are of vectors."""
    if squares.ndim - batch_axes(path) != 2:
        return Factored(squares, None)
    return Factored(squares.mean(-1, keepdims=True), squares.mean(-2, keepdims=True))


def _rms(path: tuple[Any, ...], values: jax.Array) -> jax.Array:
    """Of each matrix or vector of a stack."""
    axes = tuple(range(batch_axes(path_name(path)), values.ndim))
    return jnp.sqrt(jnp.square(values).mean(axes, keepdims=True))


def _of(leaf: jax.Array) -> Any:
    sharding = jax.typeof(leaf).sharding
    return sharding if sharding.mesh.axis_names else None
