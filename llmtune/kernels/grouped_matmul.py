"""Grouped matmul: rows sorted by group, each group times its own matrix, no group padded and no row dropped.

    x [rows, in], w [groups, in, out], sizes int32 [groups]  -->  [rows, out], zeros beyond the sum of the sizes

`jax.lax.ragged_dot` everywhere but on TPU, where XLA makes it dense work over all groups; there a Pallas kernel (megablox)
visits only the tiles that hold rows. The platform is that of the program being compiled, not of the machine that compiles.
The backward pass is written out, so that it saves x and w alone whichever kernel runs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.kernels.platform import platform

TILE = 128  # rows of a TPU tile; its other sides grow with the matrices
LARGEST_TILE = 512


@jax.custom_vjp
def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """See the module's docstring; the result is in x's dtype, sums in float32."""
    return _forward(x, w, sizes)[0]


def _forward(x, w, sizes):
    rows, _ = _kernels()
    return rows(x, w, sizes), (x, w, sizes)


def _backward(saved, gradient):
    x, w, sizes = saved
    rows, matrices = _kernels()
    dx, dw = rows(gradient, w.swapaxes(1, 2), sizes), matrices(x, gradient, sizes)
    return dx, dw.astype(w.dtype), np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


def _kernels() -> tuple[Callable, Callable]:
    """(rows, matrices): those of the platform."""
    return (_rows_tpu, _matrices_tpu) if platform() == "tpu" else (_rows, _matrices)


def _rows(x, w, sizes):
    out = jax.lax.ragged_dot(x, w, sizes, precision=_precision(x), preferred_element_type=jnp.float32)
    return _in_groups(out, sizes).astype(x.dtype)


def _matrices(x, gradient, sizes):
    """[groups, in, out]: for each group, the transpose of its rows of x times its rows of the gradient."""
    dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(
        _in_groups(x, sizes), gradient, sizes, dimensions, precision=_precision(x), preferred_element_type=jnp.float32
    )


def _rows_tpu(x, w, sizes, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # here: importing Pallas takes a second

    rows, tiling = x.shape[0], _tiling(x.shape[1], w.shape[2])
    kernel = functools.partial(gmm, preferred_element_type=x.dtype, tiling=tiling, interpret=interpret)
    out = kernel(_pad_rows(x), w, sizes)[:rows]
    return _in_groups(out, sizes).astype(x.dtype)


def _matrices_tpu(x, gradient, sizes, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = _tiling(x.shape[1], gradient.shape[1])
    kernel = functools.partial(tgmm, preferred_element_type=x.dtype, tiling=tiling, interpret=interpret)
    out = kernel(_pad_rows(x).T, _pad_rows(gradient), sizes)
    return jnp.where((sizes > 0)[:, None, None], out, 0.0)  # a group without rows is never visited


def _tiling(width: int, height: int) -> tuple[int, int, int]:
    return TILE, min(LARGEST_TILE, width), min(LARGEST_TILE, height)


def _pad_rows(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % TILE), (0, 0)))


def _in_groups(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows beyond the last group as zeros: kernels leave there what they find."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] < sizes.sum(), x, 0.0)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
