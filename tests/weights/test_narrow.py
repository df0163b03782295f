"""The rounding that is spelled out in bits is that of the conversion, for every kind of number."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llmtune.weights import narrow as narrowing
from llmtune.weights.narrow import narrow, to_bfloat16


def test_every_kind_of_number():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)  # all exponents, both signs, nan
    halves = (rng.integers(0, 2**16, 50_000, dtype=np.uint32) << 16) | 0x8000  # exactly between two numbers
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, 1e-38], np.float32)
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)  # one bit more would carry out of these
    values = np.concatenate([bits.view(np.float32), halves.view(np.float32), special, nan.view(np.float32)])
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    found = np.asarray(jax.jit(to_bfloat16)(values))
    missing = np.isnan(values)
    assert np.isnan(found[missing].astype(np.float32)).all()
    tiny = np.abs(values) < np.finfo(np.float32).tiny  # CPUs read such numbers as they are, some accelerators as zero
    same = found.view(np.uint16) == expected.view(np.uint16)
    assert same[~missing & ~tiny].all()


def test_the_gradient_is_that_of_the_conversion(monkeypatch):
    w, out = (np.random.default_rng(n).standard_normal(64).astype(np.float32) for n in (0, 1))

    def loss(w):
        return (narrow(w, jnp.dtype("bfloat16")).astype(jnp.float32) * out).sum()

    expected = jax.grad(loss)(w)
    monkeypatch.setattr(narrowing, "platform", lambda: "tpu")
    np.testing.assert_array_equal(jax.grad(loss)(w), expected)
    assert "convert_element_type[new_dtype=bfloat16" not in str(jax.make_jaxpr(lambda w: narrow(w, jnp.bfloat16))(w))
