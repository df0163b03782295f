"""A digest is the same on every mesh, and another for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmtune.training.checkpoint.digest import digests, to_text

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "float8_e4m3fn")


def reference(array):
    """The definition in plain numpy, an element at a time modulo 2^32."""
    words = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}").astype(np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    mixed = (words + np.arange(len(words), dtype=np.uint64) * np.uint64(0x9E3779B1)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)) & mask
    mixed ^= mixed >> np.uint64(16)
    other = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(0x27D4EB2F)) & mask
    other ^= other >> np.uint64(13)
    return "".join(f"{int(own.sum() & mask):08x}" for own in (mixed, other))


def some(dtype, shape=(8, 12, 16)):
    return np.random.default_rng(0).normal(size=shape, scale=3).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_numpy_makes_of_the_definition(dtype):
    assert to_text(digests([jnp.asarray(some(dtype))])[0]) == reference(some(dtype))


def test_it_is_the_same_on_every_mesh():
    array, found = some("float32"), set()
    for shape, spec in (((1, 1), P()), ((8, 1), P("a")), ((2, 4), P("a", None, "b")), ((4, 2), P(("a", "b"))),
                        ((2, 2), P(None, "b", "a")), ((8, 1), P())):  # fmt: skip
        mesh = jax.make_mesh(shape, ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            found.add(to_text(digests({"x": jax.device_put(array, NamedSharding(mesh, spec))})["x"]))
    assert found == {reference(array)}


def test_every_flipped_bit_and_every_swap_is_another_digest():
    array = some("float32", (16, 8))
    flat = np.stack([array.reshape(-1)] * 64)
    for k in range(32):
        flat[k].view(np.uint32)[3 * k] ^= np.uint32(1 << k)
        flat[32 + k][[k, k + 40]] = flat[32 + k][[k + 40, k]]
    texts = {to_text(own) for own in digests([jnp.asarray(row) for row in flat])}
    assert len(texts) == 64 and reference(array) not in texts


def test_scalars_and_empty_arrays_have_one_too():
    assert len({to_text(own) for own in digests([jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)])}) == 2
    assert to_text(digests([jnp.zeros((0, 3))])[0]) == "0" * 16
