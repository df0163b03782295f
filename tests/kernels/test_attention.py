"""Every form of attention against torch in float64: grouped heads, odd sizes, windows, documents, padding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.attention import LENGTHS, largest_difference, temporary_bytes
from llmtune.kernels import Mask, attention, cached_attention
from llmtune.kernels.blocked_attention import blocked_attention
from llmtune.kernels.splash import splash_attention
from llmtune.kernels.strip_attention import strip_attention
from llmtune.sharding import make_mesh
from tests.weights.test_doors import every_shape

FORMS = {
    "strips": strip_attention,
    "blocks": functools.partial(blocked_attention, block=64),
    "splash": functools.partial(splash_attention, interpret=True),  # the kernel of TPUs in Pallas's interpreter
}
BY_DAY = ("grouped, odd length", "window over blocks of a TPU")  # of the interpreter, which is slow
CASES = {  # batch, seq, heads, kv heads, head size, window
    "plain": (2, 128, 4, 4, 16, None),
    "grouped, odd length": (1, 333, 6, 2, 20, None),
    "one key head, odd size": (2, 197, 5, 1, 34, None),
    "window inside a block": (1, 300, 4, 2, 16, 17),
    "window over blocks": (1, 450, 4, 2, 16, 130),
    "window of a whole block": (1, 257, 2, 2, 16, 64),
    "five blocks of a TPU": (1, 600, 4, 2, 16, None),
    "window over blocks of a TPU": (1, 600, 2, 1, 16, 200),
}


def example(case):
    batch, seq, heads, kv_heads, size, window = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v, out = (rng.standard_normal((batch, seq, n, size)) for n in (heads, kv_heads, kv_heads, heads))
    segments = np.zeros((batch, seq), np.int32)
    for row in range(batch):  # padding, three documents of which one is a single token, padding
        cuts = [5 + row, seq // 3, seq // 3 + 1, seq - 9]
        for document, (start, end) in enumerate(itertools.pairwise(cuts), 1):
            segments[row, start:end] = document
    return q, k, v, out, segments, Mask(causal=True, window=window)


def reference(q, k, v, out, segments, mask):
    """Result and gradients of sum(result * out), in float64, with the mask spelled out token by token."""
    seq = q.shape[1]
    i, j = np.arange(seq)[:, None], np.arange(seq)[None, :]
    seen = (i >= j) & (True if mask.window is None else i - j < mask.window)
    seen = seen & (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    result = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in inputs), attn_mask=torch.tensor(seen)[:, None], enable_gqa=True
    ).transpose(1, 2)
    result = torch.where(torch.tensor(segments > 0)[:, :, None, None], result, 0.0)
    (result * torch.tensor(out)).sum().backward()
    return [x.detach().numpy() for x in (result, *(x.grad for x in inputs))]


def every_form_and_case():
    for form, case in itertools.product(FORMS, CASES):
        yield pytest.param(form, case, marks=[pytest.mark.nightly] if form == "splash" and case not in BY_DAY else [])


@pytest.mark.parametrize(("form", "case"), list(every_form_and_case()))
def test_result_and_gradients(form, case):
    q, k, v, out, segments, mask = example(case)
    scale = q.shape[-1] ** -0.5

    def run(q, k, v):
        result = FORMS[form](q, k, v, jnp.asarray(segments), mask=mask, scale=scale)
        return (result * out).sum(), result

    compiled = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    (_, result), gradients = compiled(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    for ours, theirs in zip((result, *gradients), reference(q, k, v, out, segments, mask), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


@pytest.mark.parametrize("form", list(FORMS))
def test_extreme_scores_and_rows_of_padding_give_no_nan(form):
    q = jnp.full((1, 128, 2, 16), 60.0)
    segments = jnp.zeros((1, 128), jnp.int32).at[0, :40].set(1)
    run = jax.jit(lambda q, k, v: FORMS[form](q, k, v, segments, mask=Mask(), scale=1.0))
    out, back = jax.vjp(run, q, q, q)
    gradients = back(jnp.ones_like(out))
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    assert not np.any(out[0, 40:]) and not any(np.any(g[0, 40:]) for g in gradients)


def test_a_long_row_never_holds_its_scores():
    """Forward and backward of a row of 8192 tokens: nothing as large as one head's [seq, seq]."""
    seq = 8192
    x, segments = jnp.ones((1, seq, 2, 8)), jnp.ones((1, seq), jnp.int32)

    def loss(q, k, v):
        return attention(q, k, v, mask=Mask(), segments=segments, scale=1.0).sum()

    shapes = every_shape(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x).jaxpr)
    assert max(int(np.prod(shape)) for shape in shapes) < seq * seq // 64


@pytest.mark.parametrize("seq", [64, 1100], ids=["strips", "strips of uneven length"])
def test_heads_and_rows_spread_over_eight_devices(seq):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, seq, n, 16)).astype(np.float32) for n in (8, 4, 4))
    segments = np.ones((4, seq), np.int32)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    run = jax.jit(lambda q, k, v, s: attention(q, k, v, mask=Mask(), segments=s, scale=0.25))
    with jax.set_mesh(mesh):
        heads = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor", None))
        rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
        spread = run(*(jax.device_put(x, heads) for x in (q, k, v)), jax.device_put(segments, rows))
    np.testing.assert_allclose(spread, run(q, k, v, segments), atol=2e-5)


def test_one_token_against_a_cache():
    """Decoding: the last query alone, at its offset, sees what it saw in the whole row."""
    q, k, v, _, _, mask = example("window over blocks")
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    batch, seq = q.shape[:2]
    whole = jax.jit(functools.partial(strip_attention, mask=mask, scale=0.25))(
        q, k, v, jnp.ones((batch, seq), jnp.int32)
    )
    seen = jnp.broadcast_to(jnp.arange(seq) > seq - 1 - mask.window, (batch, seq))
    last = cached_attention(q[:, -1:], k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), seen, scale=0.25)
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-5)


@pytest.mark.parametrize("window", [None, 300])
def test_blocks_give_what_naive_attention_gives(window):
    """On a row of several blocks; at 8,192 tokens: benchmarks/attention.py."""
    assert max(largest_difference(2048, window, (2, 1, 32))) < 1e-5


def test_memory_is_linear_in_the_length():
    """The compiler's own account of forward and backward, from 2,048 to 16,384 tokens: nothing is run."""
    held = {seq: temporary_bytes(blocked_attention, seq, 2, 1, 32) for seq in LENGTHS}
    for shorter, longer in itertools.pairwise(LENGTHS):
        assert held[longer] <= 2.05 * held[shorter]
