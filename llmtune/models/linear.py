"""A matrix as a Flax module: it declares shape, axes and init, and calls the door."""

from typing import Any

import jax
from flax import nnx

from llmtune.weights import ArraySpec, Initializer, linear


class Linear(nnx.Module):
    """x @ kernel, with kernel [in, out]; `out_axes` lay out the result."""

    def __init__(
        self, n_in: int, n_out: int, axes: tuple[str, str], *, init: Initializer, out_axes: tuple[str, str, str]
    ):
        self.kernel: nnx.Param[Any] = nnx.Param(ArraySpec((n_in, n_out), axes, init=init))
        self.out_axes = out_axes

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.kernel.get_value(), self.out_axes)
