"""The grouped matmul of experts on the GPU, in float32 and in 16 bits, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.kernels.grouped_matmul import grouped_matmul
from tests.kernels.test_grouped_matmul import CASES, example, expected


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("dtype", "bit"), [("float32", 2**-22), ("bfloat16", 2**-8)])
def test_result_and_gradients(case, dtype, bit):
    x, w, sizes, out = (jnp.asarray(array) for array in example(case))
    x, w, out = (array.astype(dtype) for array in (x, w, out))
    result, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    right = expected(
        *(np.asarray(array, np.float64) for array in (x, w)), np.asarray(sizes), np.asarray(out, np.float64)
    )
    for ours, theirs in zip((result, *back(out)), right, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=4 * bit * max(1.0, np.abs(theirs).max()))
