"""RMSNorm against transformers, where eps matters and in 16 bits."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmtune.models.norm import RMSNorm


def normed(x, weight, eps, dtype):
    graphdef, state = nnx.split(RMSNorm(len(weight), eps))
    params = {"weight": jnp.asarray(weight)}
    del state
    return nnx.merge(graphdef, params)(jnp.asarray(x, dtype))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_against_transformers(eps, scale):
    rng = np.random.default_rng(0)
    x, weight = (scale * rng.standard_normal((2, 5, 48))).astype(np.float32), rng.standard_normal(48).astype(np.float32)
    for ours, theirs in ((jnp.float32, torch.float32), (jnp.bfloat16, torch.bfloat16)):
        module = LlamaRMSNorm(48, eps=eps).to(theirs)
        module.weight.data = torch.tensor(weight, dtype=theirs)
        expected = module(torch.tensor(x, dtype=theirs)).detach().float().numpy()
        np.testing.assert_allclose(normed(x, weight, eps, ours).astype(jnp.float32), expected, rtol=1e-5, atol=1e-6)
