"""Muon: the momentum of a matrix, made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    M <- momentum M + (1 - momentum) G,   O = newton_schulz(M)  ~  U V^T  where M = U S V^T

Five iterations of a quintic polynomial bring all singular values near 1: 0.7 to 1.2, which is as good. Updates are then
0.2 sqrt(max(in, out)) O, whose elements are as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so that both share one
learning rate; or sqrt(max(1, out / in)) O, as Jordan has it.

Each matrix of a stack [L, in, out] is made orthogonal by itself, whole on one device: the stack is dealt out over all devices,
so that nothing is exchanged between the first iteration and the last.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llmtune.optimizers.placement import layout_of, placed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TINY = 1e-7  # below which the norm of a momentum is not divided by


class MuonState(NamedTuple):
    """The momentum of each leaf, float32."""

    momentum: Any


def scale_by_muon(*, momentum: float, nesterov: bool, iterations: int, adjust: str) -> optax.GradientTransformation:
    """Gradients of leaves [..., in, out] -> orthogonal updates of the size that `adjust` names."""

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mixed = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mixed, updates) if nesterov else mixed
        return jax.tree.map(lambda leaf: _size(leaf, adjust) * orthogonal(leaf, iterations), ahead), MuonState(mixed)

    return optax.GradientTransformation(init, update)


def orthogonal(matrices: jax.Array, iterations: int) -> jax.Array:
    """The nearest matrices [..., in, out] whose singular values are all about 1, by Newton and Schulz's iteration."""
    mesh = jax.sharding.get_abstract_mesh()

    def dealt(m: jax.Array) -> jax.Array:
        stack = m.reshape(-1, *m.shape[-2:])
        number = len(stack)
        if not mesh.empty:
            stack = jnp.pad(stack, ((0, -number % mesh.size), (0, 0), (0, 0)))
            stack = jax.lax.with_sharding_constraint(stack, PartitionSpec(mesh.axis_names))
        return _newton_schulz(stack, iterations)[:number].reshape(m.shape)

    return placed(dealt, layout_of(matrices))(matrices)


def _newton_schulz(m: jax.Array, iterations: int) -> jax.Array:
    a, b, c = COEFFICIENTS
    tall = m.shape[-2] > m.shape[-1]  # products are formed on the narrow side
    x = m.swapaxes(-1, -2) if tall else m
    x = x / jnp.maximum(jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True)), TINY)
    for _ in range(iterations):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.swapaxes(-1, -2) if tall else x


def _size(leaf: jax.Array, adjust: str) -> float:
    inner, outer = leaf.shape[-2:]
    return math.sqrt(max(1, outer / inner)) if adjust == "original" else 0.2 * math.sqrt(max(inner, outer))
