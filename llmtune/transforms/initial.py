"""Factors that begin with a part of the weight itself, in place of noise and zeros.

    pissa    the largest singular values (Meng et al. 2024, arXiv:2404.02948, equations 2 to 4):  W ~ a0 @ b0 * scale
    olora    the first directions of a QR decomposition (Buyukakyuz 2024, arXiv:2406.01775, algorithm 1)

An initialiser is a function (W float32 [in, out], rank, scale) -> (a0 [in, rank], b0 [rank, out]). What it takes is taken out of
the base, so that the model begins as it was.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.transforms.select import weights_by_path
from llmtune.transforms.transform import Params
from llmtune.weights import dense

Initial = Callable[[jax.Array, int, jax.Array], tuple[jax.Array, jax.Array]]


def pissa(w: jax.Array, rank: int, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The principal singular values and vectors, shared evenly by both factors."""
    u, values, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * v[:rank]


def olora(w: jax.Array, rank: int, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormal columns, and the rows that they stand before, of W.T as peft stores it."""
    del scale
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


INITIAL: dict[str, Initial] = {"pissa": pissa, "olora": olora}


def start(params: Params, additions: Mapping[str, Any], initial: Initial) -> dict[str, Any]:
    """The additions with a and b as `initial` finds them, a layer at a time. A layer whose scale is zero keeps zeros."""
    weights = weights_by_path(params)

    def begin(path: str, own: dict[str, Any]) -> dict[str, Any]:
        lead, rank = own["scale"].shape, own["a"].shape[-1]

        def of_matrix(w: Any, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = initial(dense(w), rank, jnp.where(scale == 0, 1.0, scale))
            return jax.tree.map(lambda factor: jnp.where(scale == 0, 0.0, factor), found)

        of_all = of_matrix
        for _ in lead:
            of_all = _each(of_all)
        layouts = tuple(jax.typeof(own[name]).sharding.spec for name in ("a", "b"))
        placed = jax.sharding.auto_axes(of_all, out_sharding=layouts)  # decompositions know nothing of shardings
        a, b = jax.jit(placed)(weights[path], own["scale"])
        return {**own, "a": a, "b": b}

    return {path: begin(path, own) for path, own in additions.items()}


def _each(function: Callable) -> Callable:
    return lambda w, scale: jax.lax.map(lambda pair: function(*pair), (w, scale))
