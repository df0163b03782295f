"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints.

A head of size d turns the pairs (x[i], x[i + d/2]) by the angle position * theta ** (-2 i / d). `llama3` scaling divides the
low frequencies, so that a model trained on `original_max_position_embeddings` tokens reads longer rows.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.models.config import Llama3Scaling, Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]: radians per position of each pair."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = (np.float32(1.0) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)).astype(np.float32)
    return base if rope.scaling is None else _llama3(base, rope.scaling)


def _llama3(base: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Wavelengths beyond original / low_freq_factor are stretched by `factor`, short ones kept, those between blended."""
    original = scaling.original_max_position_embeddings
    wavelength = np.float32(2 * math.pi) / base
    stretched = base / np.float32(scaling.factor)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = (np.float32(original) / wavelength - np.float32(scaling.low_freq_factor)) / np.float32(span)
    between = (1 - blend) * stretched + blend * base
    low = wavelength > original / scaling.low_freq_factor
    high = wavelength < original / scaling.high_freq_factor
    return np.where(low, stretched, np.where(high, base, between)).astype(np.float32)


def rotations(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 [batch, seq] -> (cos, sin), float32 [batch, seq, 1, head_dim / 2]: computed once, used by every layer."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn queries or keys [batch, seq, heads, head_dim] by the angles of their positions; in float32, x's dtype out."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
