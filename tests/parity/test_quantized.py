"""NF4 against bitsandbytes on a CPU, the other formats against numpy and torch's own rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmtune.weights import FORMATS, NF4, ArraySpec
from llmtune.weights.nf4 import BLOCK, DYNAMIC
from llmtune.weights.nibbles import unpack

bnb = pytest.importorskip("bitsandbytes.functional")


def theirs(matrix, double=True):
    """(codes [out, in], QuantState, values float32 [out, in]) of a matrix [out, in]."""
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=double, quant_type="nf4")
    codes = np.stack([packed.numpy().reshape(-1) >> 4, packed.numpy().reshape(-1) & 15], 1).reshape(matrix.shape)
    state.dtype = torch.float32
    return codes, state, bnb.dequantize_4bit(packed, state).numpy()


def ours(matrix, double=True):
    array = jnp.asarray(matrix.float().numpy().T).astype(str(matrix.dtype).removeprefix("torch."))
    return jax.jit(NF4.declare(ArraySpec(array.shape, (None, None)), double=double).encode)(array)


def codes_of(weight):
    return np.asarray(unpack(weight.codes, BLOCK)).reshape(weight.shape).T


def drawn(shape, dtype, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(shape) * 0.02).to(dtype)


def test_the_dynamic_data_type_is_theirs():
    np.testing.assert_array_equal(DYNAMIC, bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("shape", [(512, 4096), (1024, 1024), (300, 704)])
def test_bfloat16_matrices_value_for_value(shape):
    """Codes, magnitudes, their groups and mean, and every decoded value: equal, not close."""
    matrix = drawn(shape, torch.bfloat16, seed=2)
    codes, state, values = theirs(matrix)
    weight = ours(matrix)
    np.testing.assert_array_equal(codes_of(weight), codes)
    np.testing.assert_array_equal(np.asarray(weight.absmax).T.reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(weight.nested, state.state2.absmax.numpy())
    np.testing.assert_array_equal(weight.offset, state.offset.numpy())
    np.testing.assert_array_equal(np.asarray(weight.dense()).T, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 256), (2048, 1408)])
def test_the_rounding_of_the_mean_is_the_only_difference_there_can_be(shape, dtype):
    """torch adds up magnitudes in an order of its own; with its mean in place of ours everything decodes to its values."""
    matrix = drawn(shape, dtype, seed=1)
    codes, state, values = theirs(matrix)
    weight = ours(matrix)
    np.testing.assert_array_equal(codes_of(weight), codes)
    np.testing.assert_allclose(weight.offset, state.offset.numpy(), rtol=2e-7)
    assert (
        np.asarray(weight.absmax).T.reshape(-1) != state.absmax.numpy()
    ).mean() < 1e-4  # a tie, moved by that rounding
    blocks = (shape[0], shape[1] // 64)
    with_their_mean = NF4(
        weight.codes,
        jnp.asarray(state.absmax.numpy().reshape(blocks).T),
        jnp.asarray(state.state2.absmax.numpy()),
        jnp.asarray(state.offset.numpy()),
        weight.n_in,
    )
    np.testing.assert_array_equal(np.asarray(with_their_mean.dense()).T, values)


def test_magnitudes_in_float32():
    matrix = drawn((96, 256), torch.float32)
    codes, state, values = theirs(matrix, double=False)
    weight = ours(matrix, double=False)
    np.testing.assert_array_equal(codes_of(weight), codes)
    np.testing.assert_array_equal(np.asarray(weight.absmax).T.reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(np.asarray(weight.dense()).T, values)


def test_int8_is_the_nearest_whole_number_of_each_output():
    matrix = drawn((48, 200), torch.float32).numpy().T
    weight = FORMATS["int8"](ArraySpec(matrix.shape, (None, None))).encode(jnp.asarray(matrix))
    scale = np.abs(matrix).max(0) / np.float32(127)
    np.testing.assert_array_equal(weight.codes, np.rint(matrix / scale))
    np.testing.assert_allclose(weight.scale, scale, rtol=1e-7)


def test_fp8_rounds_as_torch_does():
    matrix = drawn((48, 200), torch.float32)
    scale = matrix.abs().amax(1, keepdim=True) / 448
    expected = (matrix / scale).to(torch.float8_e4m3fn).float().numpy()
    array = jnp.asarray(matrix.numpy().T)
    weight = FORMATS["fp8"](ArraySpec(array.shape, (None, None))).encode(array)
    np.testing.assert_array_equal(np.asarray(weight.codes.astype("float32")).T, expected)


def test_int4_is_the_nearest_of_fifteen_steps_of_each_group():
    matrix = drawn((16, 300), torch.float32).numpy().T
    weight = FORMATS["int4"](ArraySpec(matrix.shape, (None, None))).encode(jnp.asarray(matrix))
    dense = np.asarray(weight.dense())
    for first in (0, 128, 256):
        group = matrix[first : first + 128]
        step = np.abs(group).max(0) / np.float32(7)
        np.testing.assert_allclose(dense[first : first + 128], np.rint(group / step) * step, rtol=1e-6)
