"""silu(gate) * up (Shazeer 2020, arXiv:2002.05202), the gradients of both formed at once, from gate and up alone.

What lies between (the sigmoid, its gradient, the product) is as wide as the MLP for every token. Differentiated operation by
operation some of it is kept beside gate and up; here it is formed anew, in float32, when the gradient has come: Llama 3.1 8B in
full on 64 chips of a v6e, three rows of 8,192 tokens on each, has 14.9 GB alive instead of 15.8.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Both [..., inner] of one dtype -> the same. Computed in float32."""
    g, u = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(g) * u).astype(gate.dtype)


def _forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate, up), (gate, up)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    operands = jax.lax.optimization_barrier(
        (*saved, gradient)
    )  # else parts of it are formed, and kept, before the gradient
    g, u, d = (x.astype(jnp.float32) for x in operands)
    s = jax.nn.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).astype(gradient.dtype), (d * g * s).astype(gradient.dtype)


swiglu.defvjp(_forward, _backward)
