"""Rows cut over devices: the result and the gradients of whole rows, for every mask and every back end that may serve."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmtune.kernels import Mask, attention
from llmtune.kernels.blocked_attention import blocked_attention
from llmtune.kernels.context_attention import reach, with_keys_on_the_left
from llmtune.kernels.splash import splash_attention
from llmtune.kernels.strip_attention import strip_attention
from llmtune.sharding import make_mesh

BATCH, SEQ, HEADS, KV_HEADS, SIZE = 2, 512, 4, 2, 16
FORMS = {"strips": strip_attention, "blocks": functools.partial(blocked_attention, block=48)}
WINDOWS = (None, 17, 130, 200, 400)  # inside a device's 128 tokens, beyond them by one device, by two, by all
BY_DAY = [("strips", None), ("blocks", 130), ("strips", 200), ("blocks", 400)]


def example():
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((BATCH, SEQ, n, SIZE)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    segments = np.ones((BATCH, SEQ), np.int32)
    segments[0, :3], segments[0, 200], segments[0, 201:500], segments[0, 500:] = 0, 2, 3, 0
    return *arrays, segments


def with_gradients(attend, q, k, v, out, segments):
    def loss(q, k, v):
        result = attend(q, k, v, segments)
        return (result * out).sum(), result

    (_, result), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return result, *gradients


@pytest.mark.parametrize(
    ("form", "window"),
    [*BY_DAY, *(pytest.param(form, window, marks=pytest.mark.nightly)
                for form in FORMS for window in WINDOWS if (form, window) not in BY_DAY)],
)  # fmt: skip
def test_four_devices_attend_like_one(form, window):
    *arrays, out, segments = example()
    mask = Mask(window=window)
    expected = with_gradients(functools.partial(strip_attention, mask=mask, scale=0.25), *arrays, out, segments)
    mesh = make_mesh({"fsdp": 2, "context": 4})
    rows = PartitionSpec("fsdp", "context")
    heads = PartitionSpec("fsdp", "context", None, None)
    kernel = functools.partial(with_keys_on_the_left, FORMS[form], "context", mask=mask, scale=0.25)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, heads)) for x in (*arrays, out)]
        ids = jax.device_put(segments, NamedSharding(mesh, rows))
        attend = jax.shard_map(kernel, in_specs=(heads,) * 3 + (rows,), out_specs=heads, check_vma=False)
        found = with_gradients(attend, *placed, ids)
    for own, like in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, like, atol=5e-6)


def test_the_one_function_does_so_by_itself_and_says_what_it_cannot():
    *arrays, _, segments = example()
    mesh = make_mesh({"fsdp": 2, "context": 4})
    with jax.set_mesh(mesh):
        heads = NamedSharding(mesh, PartitionSpec("fsdp", "context", None, None))
        placed = [jax.device_put(x, heads) for x in arrays]
        ids = jax.device_put(segments, NamedSharding(mesh, PartitionSpec("fsdp", "context")))
        found = attention(*placed, mask=Mask(), segments=ids, scale=0.25)
        with pytest.raises(ValueError, match="is causal"):
            attention(*placed, mask=Mask(causal=False), segments=ids, scale=0.25)
    np.testing.assert_allclose(found, attention(*arrays, mask=Mask(), segments=segments, scale=0.25), atol=5e-6)


@pytest.mark.parametrize("window", [None, 129, 200])
def test_the_kernel_of_tpus_takes_keys_that_stand_before(window):
    """In Pallas's interpreter: 128 queries whose keys begin 200 earlier."""
    q, k, v, _, segments = example()
    mask = Mask(window=window, before=200)
    operands = (q[:, 200:328], k[:, :328], v[:, :328], segments[:, :328])
    whole = strip_attention(q[:, :328], k[:, :328], v[:, :328], segments[:, :328], mask=Mask(window=window), scale=0.25)
    found = splash_attention(*operands, mask=mask, scale=0.25, interpret=True)
    np.testing.assert_allclose(found, whole[:, 200:], atol=1e-5)


def test_a_window_reaches_no_further_than_it_must():
    assert [reach(Mask(window=w), 128, 8) for w in (None, 1, 2, 129, 130, 4096)] == [7, 0, 1, 1, 2, 7]
