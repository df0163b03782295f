"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints.

A head of size d turns the pairs (x[i], x[i + d/2]) by the angle position * theta ** (-2 i / d). Scalings divide the low
frequencies, so that a model trained on `original_max_position_embeddings` tokens reads longer rows:

    linear    all frequencies (Chen et al. 2023, arXiv:2306.15595)
    llama3    by wavelength, blended between two bounds (Llama 3.1)
    yarn      by the number of turns within the original length; cosines and sines grow (Peng et al. 2023, arXiv:2309.00071)
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.models.config import LinearScaling, Llama3Scaling, QueryScaling, Rope, YarnScaling

Rotation = tuple[jax.Array, jax.Array]  # (cos, sin), float32 [batch, seq, 1, head_dim / 2]


class Rotations(NamedTuple):
    """How queries and keys are turned: the same but for models that scale queries by their position."""

    queries: Rotation
    keys: Rotation


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]: radians per position of each pair."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    base = (np.float32(1.0) / wavelengths).astype(np.float32)
    return _scaled(rope.scaling, base, rope.theta)


@functools.singledispatch
def _scaled(scaling: None, base: np.ndarray, theta: float) -> np.ndarray:
    """The frequencies under a scaling; None leaves them."""
    del scaling, theta
    return base


@_scaled.register
def _linear(scaling: LinearScaling, base: np.ndarray, theta: float) -> np.ndarray:
    del theta
    return base / np.float32(scaling.factor)


@_scaled.register
def _llama3(scaling: Llama3Scaling, base: np.ndarray, theta: float) -> np.ndarray:
    """Wavelengths beyond original / low_freq_factor are stretched by `factor`, short ones kept, those between blended."""
    del theta
    original = scaling.original_max_position_embeddings
    wavelength = np.float32(2 * math.pi) / base
    stretched = base / np.float32(scaling.factor)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = (np.float32(original) / wavelength - np.float32(scaling.low_freq_factor)) / np.float32(span)
    between = (1 - blend) * stretched + blend * base
    low = wavelength > original / scaling.low_freq_factor
    high = wavelength < original / scaling.high_freq_factor
    return np.where(low, stretched, np.where(high, base, between)).astype(np.float32)


@_scaled.register
def _yarn(scaling: YarnScaling, base: np.ndarray, theta: float) -> np.ndarray:
    """Pairs with more than beta_fast turns within the original length are kept, those below beta_slow stretched."""
    size = 2 * len(base)

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes so many turns within the original length."""
        return size * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    span = last - first or 0.001
    stretch = np.clip((np.arange(len(base), dtype=np.float32) - np.float32(first)) / np.float32(span), 0, 1)
    return ((base / np.float32(scaling.factor)) * stretch + base * (1 - stretch)).astype(np.float32)


def amplitude(rope: Rope) -> float:
    """What cosines and sines are multiplied by: 1 but for YaRN."""
    if not isinstance(rope.scaling, YarnScaling):
        return 1.0
    scaling = rope.scaling
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (growth * scaling.mscale + 1.0) / (growth * scaling.mscale_all_dim + 1.0)
    return growth + 1.0


def rotations(rope: Rope, head_dim: int, positions: jax.Array) -> Rotations:
    """int32 [batch, seq] -> the rotations of its queries and keys: computed once, used by every layer."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    cos, sin = (x * np.float32(amplitude(rope)) for x in (jnp.cos(angles), jnp.sin(angles)))
    if rope.query_scaling is None:
        return Rotations((cos, sin), (cos, sin))
    scale = query_scale(rope.query_scaling, positions)[..., None, None]
    return Rotations((cos * scale, sin * scale), (cos, sin))


def query_scale(scaling: QueryScaling, positions: jax.Array) -> jax.Array:
    """float32 [batch, seq]: 1 within the original length, growing with the logarithm of its multiples beyond."""
    multiples = positions // scaling.original_max_position_embeddings
    return 1.0 + scaling.beta * jnp.log1p(multiples.astype(jnp.float32))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn queries or keys [batch, seq, heads, head_dim] by the angles of their positions; in float32, x's dtype out."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
