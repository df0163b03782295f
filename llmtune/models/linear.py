"""A matrix as a Flax module: it declares shape, axes and init, and calls the door."""

from typing import Any

import jax
from flax import nnx

from llmtune.weights import ArraySpec, Initializer, add_bias, linear


class Linear(nnx.Module):
    """x @ kernel (+ bias), with kernel [in, out]; `out_axes` lay out the result. `bias` is None where there is none."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        axes: tuple[str | None, str | None],
        *,
        init: Initializer,
        out_axes: tuple[str | None, ...],
        bias: bool = False,
    ):
        self.kernel: nnx.Param[Any] = nnx.Param(ArraySpec((n_in, n_out), axes, init=init))
        self.bias: nnx.Param[Any] = nnx.Param(ArraySpec((n_out,), axes[1:]) if bias else None)
        self.out_axes = out_axes

    def __call__(self, x: jax.Array) -> jax.Array:
        out = linear(x, self.kernel.get_value(), self.out_axes)
        bias = self.bias.get_value()
        return out if bias is None else add_bias(out, bias)
