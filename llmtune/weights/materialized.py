"""From a weight to the plain array it stands for."""

import jax
import jax.numpy as jnp

from llmtune.weights.operator import Operator


def dense(w: jax.Array | Operator) -> jax.Array:
    """The plain array of a weight: itself in float32, or what the operator multiplies by."""
    return w.dense() if isinstance(w, Operator) else w.astype(jnp.float32)
