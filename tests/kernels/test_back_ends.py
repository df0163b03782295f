"""Which back end serves what, and that the programs of other platforms hold the kernels they should: compiled for, not run."""

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from llmtune.kernels import Mask
from llmtune.kernels.cudnn import cudnn_attention
from llmtune.kernels.platform import platform
from llmtune.kernels.splash import splash_attention
from llmtune.kernels.strip_attention import strip_attention
from llmtune.sharding import make_mesh
from llmtune.training.remat import POLICIES

dispatch = importlib.import_module("llmtune.kernels.attention")  # the module; the package's attribute is the function
UNPACKED, PACKED = Mask(packed=False), Mask()
CHOICES = {  # platform, mask, (seq, size, dtype) -> back end
    "cpu": ("other", PACKED, (1024, 128, "bfloat16"), "strips"),
    "cpu, long": ("other", UNPACKED, (4096, 128, "bfloat16"), "blocks"),
    "tpu": ("tpu", PACKED, (4096, 128, "bfloat16"), "splash"),
    "tpu, window": ("tpu", Mask(window=1024), (4096, 128, "bfloat16"), "splash"),
    "tpu, a row shorter than a block": ("tpu", PACKED, (127, 128, "bfloat16"), "strips"),
    "tpu, float32": ("tpu", PACKED, (4096, 128, "float32"), "blocks"),
    "tpu, a head that is no tile": ("tpu", PACKED, (4096, 100, "bfloat16"), "blocks"),
    "gpu, one document per row": ("nvidia", UNPACKED, (4096, 128, "bfloat16"), "cudnn"),
    "gpu, window": ("nvidia", Mask(window=1024, packed=False), (4096, 64, "float16"), "cudnn"),
    "gpu, packed": ("nvidia", PACKED, (4096, 128, "bfloat16"), "blocks"),
    "gpu, packed, short": ("nvidia", Mask(window=100), (1024, 128, "bfloat16"), "strips"),
    "gpu, a window that looks ahead": ("nvidia", Mask(False, 100, packed=False), (1024, 128, "bfloat16"), "strips"),
    "gpu, float32": ("nvidia", UNPACKED, (4096, 128, "float32"), "blocks"),
    "gpu, a head of 100": ("nvidia", UNPACKED, (4096, 100, "bfloat16"), "blocks"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CHOICES))
def test_the_table(case):
    on, mask, (seq, size, dtype), expected = CHOICES[case]
    q = jax.ShapeDtypeStruct((2, seq, 4, size), dtype)
    assert dispatch.back_end(on, mask, q).name == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "tpu"), ("TPU7x", "tpu"), ("NVIDIA H100 80GB HBM3", "nvidia"), ("AMD MI300X", "other")],
)
def test_the_platform_is_that_of_the_program(kind, name):
    assert platform() == "other"
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=name)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)):
        assert platform() == name


@pytest.fixture
def lowered_for_gpu(monkeypatch):
    """The text of attention's forward and backward, lowered for CUDA on this CPU, over a mesh of four devices."""
    monkeypatch.setattr(dispatch, "platform", lambda: "nvidia")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)  # none is here
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])

    def lower(mask: Mask, dtype: str = "bfloat16") -> str:
        def loss(q, k, v, segments):
            return dispatch.attention(q, k, v, mask=mask, segments=segments, scale=0.1).astype(jnp.float32).sum()

        def declare(dtype, *shape, spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

        heads = functools.partial(declare, dtype, 4, 256, spec=("fsdp", None, "tensor", None))
        with jax.set_mesh(mesh):
            traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(
                heads(8, 64), heads(2, 64), heads(2, 64), declare("int32", 4, 256, spec=("fsdp", None))
            )
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower


@pytest.mark.parametrize("window", [None, 100])
def test_rows_of_one_document_go_to_cudnn(lowered_for_gpu, window):
    text = lowered_for_gpu(Mask(window=window, packed=False))
    calls = [line.replace("\\22", '"') for line in text.splitlines() if "custom_call @__cudnn" in line]
    assert [re.findall(r"@__cudnn\$(\w+)", line)[0] for line in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for line in calls:
        assert "PADDING_CAUSAL" in line
        assert f'"sliding_window_length": {window or 0},' in line
        assert '["2", "4", "256", "256"]' in line  # per device: 2 rows of 4, 4 heads of 8


@pytest.mark.parametrize("window", [None, 100])
def test_packed_rows_never_go_to_cudnn(lowered_for_gpu, window):
    assert "cudnn" not in lowered_for_gpu(Mask(window=window))
    assert "cudnn" not in lowered_for_gpu(Mask(window=window, packed=False), "float32")


@pytest.mark.parametrize("window", [None, 50])
def test_what_is_told_to_cudnn_means_the_same(monkeypatch, window):
    """The very arguments, computed by JAX's own form of the same function; a row that is packed after all gives NaN."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: real(*a, **{**k, "implementation": "xla"}))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 128, n, 16)), jnp.float32) for n in (4, 2, 2))
    segments = np.zeros((4, 128), np.int32)
    segments[0], segments[1, :80] = 1, 1  # a full row, a padded one; the third is padding alone
    segments[3, :50], segments[3, 50:] = 1, 2  # packed, against the promise
    mask = Mask(window=window, packed=False)

    def run(form):
        def both(q, k, v):
            out, back = jax.vjp(lambda *x: form(*x, jnp.asarray(segments), mask=mask, scale=0.25), q, k, v)
            return out, *back(out)

        return jax.jit(both)(q, k, v)

    (ours, *gradients), (theirs, *expected) = run(cudnn_attention), run(strip_attention)
    assert np.isnan(ours[3]).all()
    np.testing.assert_allclose(ours[:3], theirs[:3], atol=1e-5)
    for gradient, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient[:3], right[:3], atol=1e-4)


def test_splash_visits_no_block_outside_the_window():
    """Sixteen blocks of 512 in a row: with a window of 1,024 three of them for each block of queries."""
    x, segments = jax.ShapeDtypeStruct((1, 8192, 2, 16), jnp.bfloat16), jnp.ones((1, 8192), jnp.int32)
    for mask, width in ((Mask(), 16), (Mask(window=1024), 3)):
        attend = functools.partial(splash_attention, segments=segments, mask=mask, scale=1.0)
        assert f"grid=(2, 16, {width})" in str(jax.make_jaxpr(attend)(x, x, x))


@pytest.mark.parametrize(("remat", "kept"), [("none", 1), ("block", 0)])
def test_what_splash_leaves_for_the_backward_pass_has_a_name(capsys, remat, kept):
    """Under `remat: none` its result and log-sum-exp are kept; benchmarks/attention_ahead.py counts the kernels."""
    x, segments = jnp.ones((1, 128, 2, 16), jnp.bfloat16), jnp.ones((1, 128), jnp.int32)
    attend = POLICIES[remat](lambda x: splash_attention(x * 2, x, x, segments, mask=Mask(), scale=0.25))
    jax.ad_checkpoint.print_saved_residuals(attend, x)
    saved = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert (saved.count("bf16[1,2,128,16]"), saved.count("f32[1,2,128]")) == (kept, kept)


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs takes libtpu")
def test_compiled_for_tpus():
    """Forward and backward for an absent v5e: the Pallas kernels are there, and nothing of [seq, seq]."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attention_ahead"], cwd=root, env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count(" 3 kernels") == 9 and done.stdout.count(" 4 kernels") == 1
