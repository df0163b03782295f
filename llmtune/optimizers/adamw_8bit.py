"""Adam's moments in 8 bits a number, decoded, moved and encoded again in every update.

    2 bytes and 8 / 256 of scales for each weight, where float32 moments take 8

Weights with few numbers, or whose shape leaves no block of some size, keep float32 moments, as do vectors: there is nothing to
be saved in them. Codes lie on the mesh as their weights do.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llmtune.optimizers.eight_bits import Blocks, decode, encode, scale_layout, tile, zero_code
from llmtune.optimizers.paths import batch_axes
from llmtune.optimizers.placement import layout_of, placed
from llmtune.weights import path_name

SMALLEST_WEIGHT, SMALLEST_BLOCK = 4096, 64  # numbers; bitsandbytes too keeps fewer than 4096 in 32 bits


class Adam8bitState(NamedTuple):
    """`count`: updates done; `first`, `second`: `Blocks` or float32 arrays by leaf."""

    count: jax.Array
    first: Any
    second: Any


def scale_by_adam_8bit(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction, by moments that are exact within an update and rounded between updates."""

    def init(params: Any) -> Adam8bitState:
        def moments(signed: bool) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, leaf: _zeros(path_name(path), leaf, signed), params)

        return Adam8bitState(jnp.zeros((), jnp.int32), moments(True), moments(False))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        corrections = [1 - b ** count.astype(jnp.float32) for b in (b1, b2)]

        def leaf(grad: jax.Array, first: Any, second: Any) -> tuple[jax.Array, Any, Any]:
            if not isinstance(first, Blocks):
                return _move(grad, first, second, *corrections, b1=b1, b2=b2, eps=eps)

            def within(grad, m_codes, m_scales, v_codes, v_scales, *corrections):
                first = decode(Blocks(m_codes, m_scales), signed=True)
                second = decode(Blocks(v_codes, v_scales), signed=False)
                direction, first, second = _move(grad, first, second, *corrections, b1=b1, b2=b2, eps=eps)
                return (direction, *encode(first, signed=True), *encode(second, signed=False))

            layouts = tuple(layout_of(own) for own in (grad, *first, *second))
            direction, *codes = placed(within, layouts)(grad, *first, *second, *corrections)
            return direction, Blocks(*codes[:2]), Blocks(*codes[2:])

        grad_leaves, structure = jax.tree.flatten(updates)
        rows = zip(
            grad_leaves, structure.flatten_up_to(state.first), structure.flatten_up_to(state.second), strict=True
        )
        results = [leaf(*row) for row in rows]
        directions, firsts, seconds = (jax.tree.unflatten(structure, column) for column in zip(*results, strict=True))
        return directions, Adam8bitState(count, firsts, seconds)

    return optax.GradientTransformation(init, update)


def _move(
    grad: jax.Array, first: jax.Array, second: jax.Array, *corrections: jax.Array, b1: float, b2: float, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(Adam's direction, both moments after this gradient)."""
    first = b1 * first + (1 - b1) * grad
    second = b2 * second + (1 - b2) * grad * grad
    return (first / corrections[0]) / (jnp.sqrt(second / corrections[1]) + eps), first, second


def fits(path: str, leaf: jax.Array) -> bool:
    """Whether a leaf's moments are worth 8 bits: matrices with enough numbers, in blocks of some size."""
    matrix = leaf.ndim - batch_axes(path) == 2
    return matrix and leaf.size >= SMALLEST_WEIGHT and math.prod(tile(leaf.shape)) >= SMALLEST_BLOCK


def _zeros(path: str, leaf: jax.Array, signed: bool) -> Any:
    if not fits(path, leaf):
        return jnp.zeros_like(leaf)
    rows, columns = tile(leaf.shape)
    *outer, inner, last = leaf.shape
    mesh, layout = jax.sharding.get_abstract_mesh(), layout_of(leaf)
    scales = PartitionSpec() if mesh.empty else scale_layout(layout, leaf.shape, dict(mesh.shape))
    codes = jnp.full_like(leaf, zero_code(signed), jnp.uint8)
    zeros = jnp.zeros((*outer, inner // rows, last // columns), jnp.float32)
    return Blocks(codes, zeros if mesh.empty else jax.sharding.reshard(zeros, scales))
