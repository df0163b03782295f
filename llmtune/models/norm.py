"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): x / rms(x) * weight."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmtune.weights import ArraySpec, constant


class RMSNorm(nnx.Module):
    """Normalises the last axis in float32, and scales in the activations' dtype (as the published models do)."""

    def __init__(self, size: int, eps: float):
        self.weight: nnx.Param[Any] = nnx.Param(ArraySpec((size,), (None,), init=constant(1.0)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.weight.get_value().astype(x.dtype) * (wide * rms).astype(x.dtype)
