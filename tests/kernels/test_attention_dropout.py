"""Attention dropout: one set of places whatever forms it, and the result of torch with those weights left out."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.random import threefry2x32_p
from jax.sharding import NamedSharding, PartitionSpec

from llmtune.kernels import AttentionDropout, Mask, attention, draw_attention_dropout
from llmtune.kernels.attention_dropout import threefry
from llmtune.kernels.blocked_attention import blocked_attention
from llmtune.kernels.strip_attention import strip_attention
from llmtune.sharding import make_mesh
from tests.kernels.test_attention import example
from tests.weights.test_doors import every_shape

dispatch = importlib.import_module("llmtune.kernels.attention")
FORMS = {"strips": strip_attention, "blocks": functools.partial(blocked_attention, block=64)}
CASES = ("grouped, odd length", "window over blocks", "one key head, odd size")
RATE = 0.3


def all_factors(batch, heads, seq, dropout):
    """float32 [batch, heads, seq, seq], of a whole row at once."""
    dropped = dropout.of_rows(jnp.arange(batch, dtype=jnp.uint32), jnp.arange(heads, dtype=jnp.uint32)).grouped(heads)
    return np.asarray(dropped.factors(jnp.arange(seq), jnp.arange(seq)))[:, :, 0]


def by_torch(q, k, v, out, segments, mask, factors):
    """Result and gradients of sum(result * out) in float64, the weights times the factors."""
    seq = q.shape[1]
    i, j = np.arange(seq)[:, None], np.arange(seq)[None, :]
    seen = (i >= j) & (True if mask.window is None else i - j < mask.window)
    seen = seen & (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    queries, keys, values = (x.transpose(1, 2) for x in inputs)
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (keys, values))
    scores = queries @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~torch.tensor(seen)[:, None], -1e9), dim=-1) * torch.tensor(factors)
    result = torch.where(torch.tensor(segments > 0)[:, :, None, None], (weights @ values).transpose(1, 2), 0.0)
    (result * torch.tensor(out)).sum().backward()
    return [x.detach().numpy() for x in (result, *(x.grad for x in inputs))]


def gradients(attend, q, k, v, out):
    def run(q, k, v):
        result = attend(q, k, v)
        return (result * out).sum(), result

    (_, result), found = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return result, *found


def test_threefry_is_that_of_jax():
    words = [jnp.asarray(own) for own in np.random.default_rng(0).integers(0, 2**32, (4, 1000), np.uint32)]
    ours = threefry((words[0], words[1]), (words[2], words[3]))
    for own, theirs in zip(ours, threefry2x32_p.bind(*words), strict=True):
        np.testing.assert_array_equal(own, theirs)


@pytest.mark.parametrize(("form", "case"), list(itertools.product(FORMS, CASES)))
def test_result_and_gradients_are_those_of_torch_without_these_weights(form, case):
    q, k, v, out, segments, mask = example(case)
    batch, seq, heads, size = q.shape
    dropout = draw_attention_dropout(jax.random.key(3), RATE).of_layer(1, 2)

    def attend(q, k, v):
        dropped = dropout.of_rows(jnp.arange(batch, dtype=jnp.uint32), jnp.arange(heads, dtype=jnp.uint32))
        return FORMS[form](q, k, v, jnp.asarray(segments), mask=mask, scale=size**-0.5, dropped=dropped)

    found = gradients(attend, *(jnp.asarray(x, jnp.float32) for x in (q, k, v, out)))
    expected = by_torch(q, k, v, out, segments, mask, all_factors(batch, heads, seq, dropout))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 4}, {"fsdp": 2, "context": 4}, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize(("form", "window"), [("strips", None), ("strips", 100), ("blocks", 100)])
def test_every_mesh_drops_the_same(axes, form, window, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v, out = (rng.standard_normal((8, 512, n, 16)).astype(np.float32) for n in (8, 4, 4, 8))
    segments = np.repeat(np.array([1, 2, 0]), [200, 300, 12])[None].repeat(8, axis=0).astype(np.int32)
    dropout = draw_attention_dropout(jax.random.key(0), RATE)

    def run(q, k, v, out, segments, dropout):
        attend = functools.partial(attention, mask=Mask(window=window), segments=segments, scale=0.25, dropout=dropout)
        return gradients(attend, q, k, v, out)

    expected = run(q, k, v, out, segments, dropout)
    monkeypatch.setattr(dispatch, "SHORT_ROW", 2048 if form == "strips" else 0)
    mesh = make_mesh(axes)
    rows, heads = "fsdp", "tensor" if "tensor" in axes else None
    seq = "context" if "context" in axes else None
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec(rows, seq, heads, None))
        placed = [jax.device_put(x, whole) for x in (q, k, v, out)]
        found = run(*placed, jax.device_put(segments, NamedSharding(mesh, PartitionSpec(rows, seq))), dropout)
    for own, like in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, like, atol=2e-5)


def test_the_share_that_is_dropped_and_that_nothing_repeats():
    """Of rows, heads, layers and steps: the rate within 5 standard deviations, and no two of them alike."""
    steps = [draw_attention_dropout(jax.random.key(n), RATE) for n in range(2)]
    layers = [step.of_layer(slot, index) for step in steps for slot, index in ((0, 0), (1, 0), (0, 1))]
    factors = np.stack([all_factors(2, 3, 128, layer) for layer in layers]).reshape(-1, 128 * 128)
    assert set(np.unique(factors)) == {np.float32(0), np.float32(1 / (1 - RATE))}
    kept = factors > 0
    off = kept.mean(axis=1) - (1 - RATE)
    assert np.abs(off).max() < 5 * np.sqrt(RATE * (1 - RATE) / 128**2) and abs(kept.mean() - 0.7) < 0.005
    together = np.corrcoef(kept) - np.eye(len(kept))
    assert np.abs(together).max() < 5 / 128
    assert np.abs(np.corrcoef(kept[0].reshape(128, 128)) - np.eye(128)).max() < 6 / np.sqrt(128)


@pytest.mark.parametrize("on", ["tpu", "nvidia"])
def test_kernels_that_cannot_drop_are_not_asked(on):
    q, mask = jax.ShapeDtypeStruct((2, 4096, 4, 128), jnp.bfloat16), Mask(packed=False)
    assert dispatch.back_end(on, mask, q).name in ("splash", "cudnn")
    assert dispatch.back_end(on, mask, q, drops=True).name == "blocks"


@pytest.mark.parametrize("seq", [1024, 4096], ids=["strips", "blocks"])
def test_a_scan_over_layers_keeps_nothing_for_it(seq):
    """Temporary bytes of the gradient through four layers, beside those without dropout."""
    x, segments, words = jnp.ones((2, seq, 8, 8)), jnp.ones((2, seq), jnp.int32), jnp.zeros(2, jnp.uint32)

    def loss(x, words, rate):
        def layer(x, n):
            dropout = AttentionDropout(words, rate).of_layer(0, n) if rate else None
            return x + attention(x, x, x, mask=Mask(), segments=segments, scale=1.0, dropout=dropout), None

        return jax.lax.scan(layer, x, jnp.arange(4))[0].sum()

    def temporary(rate):
        compiled = jax.jit(jax.grad(functools.partial(loss, rate=rate))).lower(x, words).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(RATE) < 1.25 * temporary(0.0)


def test_a_long_row_never_holds_its_places():
    seq = 8192
    x, segments = jnp.ones((1, seq, 2, 8)), jnp.ones((1, seq), jnp.int32)

    def loss(q, k, v, words):
        dropout = AttentionDropout(words, RATE)
        return attention(q, k, v, mask=Mask(), segments=segments, scale=1.0, dropout=dropout).sum()

    words = jnp.zeros(2, jnp.uint32)
    shapes = every_shape(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x, words).jaxpr)
    assert max(int(np.prod(shape)) for shape in shapes) < seq * seq // 64
