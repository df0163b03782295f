"""Weights in the dtype of the products: float32 to 16 bits, one layer at a time.

A scan over layers slices a stack of float32 weights, and each slice becomes 16 bits before it is gathered. The TPU compiler
turns that around: it forms a 16-bit copy of the whole stack before the scan, and slices the copy, 2 bytes for every weight that
a device holds. It does so with conversions; with the same rounding spelled out in bits it does not (Mistral 7B on 16 chips of a
v5e: 9.3 GB instead of 10.2).
"""

import jax
import jax.numpy as jnp

from llmtune.kernels.platform import platform


def narrow(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`w.astype(dtype)`, in a form that the TPU compiler leaves where it stands. Rounds to nearest, ties to even."""
    if platform() == "tpu" and w.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return to_bfloat16(w)
    return w.astype(dtype)


@jax.custom_vjp
def to_bfloat16(w: jax.Array) -> jax.Array:
    """float32 -> bfloat16, by bits."""
    bits = jax.lax.bitcast_convert_type(w, jnp.uint32)
    half = jnp.uint32(0x7FFF) + (
        (bits >> 16) & 1
    )  # carries where the rest is above a half, or a half above an odd number
    rounded = jax.lax.bitcast_convert_type(((bits + half) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(w != w, jnp.full_like(rounded, jnp.nan), rounded)


def _forward(w: jax.Array) -> tuple[jax.Array, None]:
    return to_bfloat16(w), None


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient.astype(jnp.float32),)


to_bfloat16.defvjp(_forward, _backward)
