"""Experts that stay, and tokens that travel to them: what a mixture does where a strategy splits rows over the axis of experts.

    device            0          1          2          3
    holds             its own rows, and its own experts: gathered over all other axes, once for a layer
    a piece of rows   each token goes to the devices of its k experts, through them, and comes back      (all-to-all, twice)

What travels are activations, k times `hidden` for each token, instead of the matrices of all experts. No token is dropped: a
device has room for all that a piece could send it. Pieces are therefore small, and each is computed again in the backward pass,
so that of all pieces nothing but their tokens is kept. (Lepikhin et al. 2020, arXiv:2006.16668, section 3.2.)
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.kernels import exchange_rows
from llmtune.sharding import REPLICATED, spec
from llmtune.weights import is_operator
from llmtune.weights.gather import gather_inside, names_of
from llmtune.weights.narrow import narrow

PIECE = 2048  # tokens of a device that travel at a time
Experts = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (weights, rows sorted by expert, rows of each) -> rows


def tokens_travel() -> bool:
    """Whether the strategy splits rows over the very axis that it splits experts over."""
    experts = names_of(spec("expert")[0])
    return bool(experts) and experts <= names_of(spec("batch")[0])


def through_spread_experts(
    apply: Experts, weights: Any, x: jax.Array, chosen: jax.Array, shares: jax.Array, number: int
) -> jax.Array:
    """The sum of what the chosen experts make of each token, by their shares of it.

    weights: a tree of weights of experts, [experts, in, out]; x [batch, seq, hidden]; chosen int32 and shares float32
    [batch, seq, k]; `number` of experts. Each device's experts see plain arrays, those of one device.
    """
    (axis,) = names_of(spec("expert")[0])
    layouts, stored = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, weights), _dtypes(weights)

    def own(weights: Any, x: jax.Array, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        """Gathered narrow, held as wide as they are stored, so that the gradients of all pieces are added up in float32."""
        held = jax.tree.map(lambda leaf, parts: gather_inside(leaf, tuple(parts), kept=(axis,)), weights, layouts)
        wide = _of_dtypes(held, stored)

        def piece(*rows: jax.Array) -> jax.Array:
            return _one_piece(apply, _of_dtypes(wide, _dtypes(held)), axis, number, *rows)

        with REPLICATED.active():
            return _in_pieces(piece, x, chosen, shares)

    weights = jax.tree.map(lambda own: own if is_operator(own) else narrow(own, x.dtype), weights, is_leaf=is_operator)
    rows = tuple(jax.typeof(array).sharding.spec for array in (x, chosen, shares))
    return jax.shard_map(own, in_specs=(layouts, *rows), out_specs=rows[0], check_vma=False)(weights, x, chosen, shares)


def _dtypes(weights: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, weights)


def _of_dtypes(weights: Any, dtypes: Any) -> Any:
    """There and back is no work: the compiler drops both conversions of what was narrow, but not those of its gradient."""
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), weights, dtypes)


def _in_pieces(through: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`through(tokens [n, hidden], ...)` of all rows [batch, seq, ...], piece by piece, each computed again backward.

    The last piece is filled up with zeros: tokens that have no share in what comes back.
    """
    batch, seq = arrays[0].shape[:2]
    pieces = -(-batch * seq // PIECE)
    size = -(-batch * seq // pieces)

    def cut(array: jax.Array) -> jax.Array:
        flat = array.reshape(batch * seq, -1)
        return jnp.pad(flat, ((0, pieces * size - batch * seq), (0, 0))).reshape(pieces, size, -1)

    again = jax.checkpoint(through, prevent_cse=False)
    _, out = jax.lax.scan(lambda carry, piece: (carry, again(*piece)), None, tuple(map(cut, arrays)))
    return out.reshape(pieces * size, -1)[: batch * seq].reshape(arrays[0].shape)


def _one_piece(
    apply: Experts, weights: Any, axis: str, number: int, x: jax.Array, chosen: jax.Array, shares: jax.Array
) -> jax.Array:
    """X [tokens, hidden], chosen and shares [tokens, k] -> [tokens, hidden]: there, through the experts, and back."""
    (tokens, k), devices = chosen.shape, jax.lax.axis_size(axis)
    own = number // devices
    picks = chosen.reshape(-1)
    order = jnp.argsort(picks, stable=True)
    counts = jax.lax.all_gather((picks[:, None] == jnp.arange(number)).sum(0, dtype=jnp.int32), axis)  # [from, experts]
    sent = counts.reshape(devices, devices, own).sum(-1)  # [from, to]
    rows = exchange_rows(x[order // k], sent, axis, devices * tokens * k)

    mine = jax.lax.dynamic_slice_in_dim(counts, jax.lax.axis_index(axis) * own, own, axis=1)  # [from, own experts]
    by_expert = _by_expert(mine, len(rows))
    out = apply(weights, rows[by_expert], mine.sum(0))
    out = exchange_rows(out[jnp.argsort(by_expert)], sent.T, axis, tokens * k)

    results = out[jnp.argsort(order)].reshape(tokens, k, -1).astype(jnp.float32)
    return (results * shares[..., None]).sum(1).astype(x.dtype)


def _by_expert(received: jax.Array, size: int) -> jax.Array:
    """The order by expert of rows that stand by where they came from, and by expert within: int32 [size].

    received int32 [from, own experts]. Rows beyond their sum stay last.
    """
    experts = received.shape[1]
    groups = jnp.searchsorted(jnp.cumsum(received.reshape(-1)), jnp.arange(size), side="right")
    ranks = jnp.where(groups == math.prod(received.shape), experts, groups % experts)
    return jnp.argsort(ranks, stable=True)
