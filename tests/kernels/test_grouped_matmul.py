"""Grouped matmul against numpy in float64, both forms: the result, both gradients, empty groups, rows beyond all groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.kernels.grouped_matmul import _matrices_tpu, _rows_tpu, grouped_matmul

CASES = {  # rows, sizes
    "all rows": (12, (5, 0, 7)), "rows beyond the groups": (12, (2, 3, 1)), "one group": (300, (0, 300, 0)),
    "no rows at all": (4, (0, 0, 0)), "across tiles": (300, (130, 1, 160)),
}  # fmt: skip


def example(case):
    rows, sizes = CASES[case]
    rng = np.random.default_rng(0)
    x, w, out = (rng.standard_normal(s).astype(np.float32) for s in ((rows, 16), (3, 16, 8), (rows, 8)))
    return x, w, np.array(sizes, np.int32), out


def expected(x, w, sizes, out):
    """(result, gradient of x, gradient of w) of sum(result * out), in float64."""
    x, w, out = (array.astype(np.float64) for array in (x, w, out))
    result, dx, dw, start = np.zeros_like(out), np.zeros_like(x), np.zeros_like(w), 0
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        result[own], dx[own], dw[group] = x[own] @ w[group], out[own] @ w[group].T, x[own].T @ out[own]
        start += size
    return result, dx, dw


@pytest.mark.parametrize("case", list(CASES))
def test_result_and_gradients(case):
    x, w, sizes, out = example(case)
    result, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), jnp.asarray(x), jnp.asarray(w))
    for ours, theirs in zip((result, *back(jnp.asarray(out))), expected(x, w, sizes, out), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case != "no rows at all"])
def test_the_kernel_of_tpus_in_its_interpreter(case):
    x, w, sizes, out = example(case)
    result, dx, dw = expected(x, w, sizes, out)
    np.testing.assert_allclose(_rows_tpu(x, w, sizes, interpret=True), result, atol=1e-4)
    np.testing.assert_allclose(_rows_tpu(out, w.swapaxes(1, 2), sizes, interpret=True), dx, atol=1e-4)
    np.testing.assert_allclose(_matrices_tpu(x, out, sizes, interpret=True), dw, atol=1e-4)


def test_sixteen_bits_are_summed_in_float32():
    x, w, sizes, _ = example("across tiles")
    result = grouped_matmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.asarray(sizes))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), expected(x, w, sizes, np.zeros((300, 8)))[0], atol=0.1)
