"""Rotary frequencies and rotations against transformers, beyond the original length too."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llmtune.models.config import Llama3Scaling, Rope
from llmtune.models.rope import inverse_frequencies, rotate, rotations

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = {
    "default": (10_000.0, None, 64),
    "large base, odd head": (1_000_000.0, None, 36),
    "llama 3.1": (500_000.0, LLAMA3 | {"factor": 8.0}, 128),
    "llama 3.2": (500_000.0, LLAMA3, 64),
    "short original": (500_000.0, LLAMA3 | {"original_max_position_embeddings": 256}, 20),
}


def theirs(theta, scaling, size):
    parameters = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        parameters |= {"rope_type": "llama3", **scaling}
    config = LlamaConfig(
        hidden_size=4 * size, num_attention_heads=4, head_dim=size, rope_parameters=parameters,
        max_position_embeddings=131_072,
    )  # fmt: skip
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("case", list(CASES))
def test_inverse_frequencies_agree_to_one_ulp(case):
    theta, scaling, size = CASES[case]
    ours = inverse_frequencies(Rope(theta, scaling and Llama3Scaling(**scaling)), size)
    np.testing.assert_array_max_ulp(ours, theirs(theta, scaling, size).inv_freq.numpy(), maxulp=2)


@pytest.mark.parametrize("case", list(CASES))
def test_rotations_of_queries(case):
    theta, scaling, size = CASES[case]
    positions = np.array([[0, 1, 7, 255, 256, 1023, 4095, 9000]], np.int32)
    x = np.random.default_rng(0).standard_normal((1, 8, 3, size)).astype(np.float32)
    rotation = rotations(Rope(theta, scaling and Llama3Scaling(**scaling)), size, jnp.asarray(positions)).keys
    cos, sin = theirs(theta, scaling, size)(torch.tensor(x), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(*(torch.tensor(x).transpose(1, 2),) * 2, cos, sin)
    np.testing.assert_allclose(rotate(jnp.asarray(x), rotation), expected.transpose(1, 2), atol=2e-3)
    near = positions[0] < 300  # far out, one ulp of a frequency is already worth a thousandth of a turn
    np.testing.assert_allclose(rotate(jnp.asarray(x), rotation)[:, near], expected.transpose(1, 2)[:, near], atol=1e-4)


def test_sixteen_bit_inputs_are_turned_in_float32():
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 64)).astype(np.float32)
    rotation = rotations(Rope(), 64, jnp.asarray([[1000, 1001, 1002, 1003]])).keys
    half = jnp.asarray(x, jnp.bfloat16)
    exact = rotate(half.astype(jnp.float32), rotation)
    assert rotate(half, rotation).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotate(half, rotation), exact.astype(jnp.bfloat16))
