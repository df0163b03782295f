"""The product and both gradients, by torch in float64; in 16 bits within one rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmtune.models.swiglu import swiglu


@pytest.mark.parametrize(("dtype", "bit"), [("float32", 2**-20), ("bfloat16", 2**-8)])
def test_product_and_gradients(dtype, bit):
    rng = np.random.default_rng(0)
    gate, up, out = (jnp.asarray(4 * rng.standard_normal((64, 128)), dtype) for _ in range(3))
    gate = gate.at[0, :4].set(jnp.asarray([0.0, -80.0, 80.0, -5.0], dtype))
    found, back = jax.vjp(swiglu, gate, up)
    given = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (gate, up)]
    right = torch.nn.functional.silu(given[0]) * given[1]
    right.backward(torch.tensor(np.asarray(out, np.float64)))
    for own, expected in zip((found, *back(out)), (right, given[0].grad, given[1].grad), strict=True):
        expected = expected.detach().numpy()
        assert own.dtype == dtype
        np.testing.assert_allclose(np.asarray(own, np.float64), expected, rtol=bit, atol=bit)
