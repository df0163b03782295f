"""Every back end that serves an NVIDIA GPU, on the GPU, against torch in float64, for every kind of mask."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.kernels import Mask, attention
from llmtune.kernels.blocked_attention import blocked_attention
from llmtune.kernels.cudnn import cudnn_attention
from llmtune.kernels.strip_attention import strip_attention
from tests.kernels.test_attention import CASES, example, reference

dispatch = importlib.import_module("llmtune.kernels.attention")
ROWS = {  # batch, seq, heads, kv heads, head size, window; rows of one document
    "grouped": (2, 512, 8, 2, 64, None),
    "heads of 128, longer than a strip": (1, 4096, 4, 1, 128, None),
    "no tile: 1,000 tokens, heads of 80": (2, 1000, 4, 4, 80, None),
    "window": (2, 1024, 8, 2, 128, 100),
    "window of 1,024 in 4,096": (1, 4096, 2, 1, 64, 1024),
    "short": (3, 72, 4, 2, 64, None),
}


def gradients_of(form, q, k, v, out, segments, mask):
    def run(q, k, v):
        result = form(q, k, v, segments=jnp.asarray(segments), mask=mask, scale=q.shape[-1] ** -0.5)
        return (result.astype(jnp.float32) * out.astype(jnp.float32)).sum(), result

    (_, result), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float64) for x in (result, *gradients)]


@pytest.mark.parametrize("form", [strip_attention, functools.partial(blocked_attention, block=64)])
@pytest.mark.parametrize("case", list(CASES))
def test_packed_rows_in_float32(form, case):
    *arrays, segments, mask = example(case)
    ours = gradients_of(form, *(jnp.asarray(x, jnp.float32) for x in arrays), segments, mask)
    for own, theirs in zip(ours, reference(*arrays, segments, mask), strict=True):
        np.testing.assert_allclose(own, theirs, atol=3e-5)


@pytest.mark.parametrize("case", list(CASES))
def test_packed_rows_in_bfloat16(case):
    *arrays, segments, mask = example(case)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    assert dispatch.back_end("nvidia", mask, arrays[0]).name in ("strips", "blocks")
    _near(gradients_of(attention, *arrays, segments, mask), arrays, segments, mask, 2**-8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", list(ROWS))
def test_cudnn(case, dtype):
    """The result and gradients are off by no more than rounding to so many bits explains; padding gets zeros."""
    batch, seq, heads, kv_heads, size, window = ROWS[case]
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal((batch, seq, n, size)), dtype) for n in (heads, kv_heads, kv_heads, heads)
    ]
    segments = np.zeros((batch, seq), np.int32)
    for row in range(batch):
        segments[row, : seq - row * 29] = 1
    mask = Mask(window=window, packed=False)
    assert dispatch.back_end("nvidia", mask, arrays[0]).name == "cudnn"
    ours = gradients_of(attention, *arrays, segments, mask)
    _near(ours, arrays, segments, mask, 2**-8 if dtype == "bfloat16" else 2**-11)
    for array in ours:
        assert not array[segments == 0].any()


def test_a_row_that_is_packed_after_all_gives_nan_and_a_row_of_padding_gives_zeros():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 256, n, 64)), jnp.bfloat16) for n in (4, 2, 2))
    segments = np.ones((3, 256), np.int32)
    segments[0, 100:], segments[1] = 2, 0
    out = cudnn_attention(q, k, v, jnp.asarray(segments), mask=Mask(packed=False), scale=0.125)
    assert np.isnan(np.asarray(out[0], np.float32)).all() and not np.asarray(out[1], np.float32).any()
    assert np.isfinite(np.asarray(out[2], np.float32)).all()


def test_a_row_of_padding_gives_no_nan_gradient():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 256, n, 64)), jnp.bfloat16) for n in (4, 2, 2, 4)]
    segments = np.stack([np.ones(256, np.int32), np.zeros(256, np.int32)])
    for array in gradients_of(attention, *arrays, segments, Mask(packed=False)):
        assert np.isfinite(array).all() and not array[1].any()


def test_the_kernel_is_in_the_program():
    q, k, v = (jnp.ones((2, 256, n, 64), jnp.bfloat16) for n in (4, 2, 2))
    segments = jnp.ones((2, 256), jnp.int32)
    run = functools.partial(attention, mask=Mask(packed=False), segments=segments, scale=0.1)
    text = jax.jit(run).lower(q, k, v).compile().as_text()
    assert "__cudnn$fmha" in text


def _near(ours, arrays, segments, mask, bit):
    """Within 4 roundings (of relative size `bit`) of the largest number, on average within one of the typical number."""
    theirs = reference(*(np.asarray(x, np.float64) for x in arrays), segments, mask)
    for own, right in zip(ours, theirs, strict=True):
        assert np.abs(own - right).max() <= 4 * bit * np.abs(right).max()
        assert np.sqrt(np.mean((own - right) ** 2)) <= 2 * bit * np.sqrt(np.mean(right**2))
