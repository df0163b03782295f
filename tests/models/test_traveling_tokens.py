"""Tokens that travel to experts: results and gradients of one device, in pieces, however uneven the choice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from llmtune.models import traveling_tokens
from llmtune.models.config import Experts, ModelConfig
from llmtune.models.moe import MoE
from llmtune.sharding import REPLICATED, load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.weights import materialize

CONFIG = dataclasses.replace(ModelConfig("MixtralForCausalLM", 64, 32, 48, 1, 4, 4, 8), experts=Experts(8, 2, 0.02))
STRATEGY = load_strategy("expert_all_to_all", configs_directory() / "strategies")
BATCH, SEQ = 8, 24
MESHES = [{"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 4}, {"expert": 8}]


def run(mesh, strategy, bias, x, out, dtype="float32"):
    """(result, gradients of the kernels and of x) of sum(result * out), the router favouring experts by `bias`."""
    module, declared = nnx.split(MoE(CONFIG))
    declared = nnx.to_pure_dict(declared)
    strategy = strategy.on(mesh)
    with jax.set_mesh(mesh):
        params = materialize(declared, jax.random.key(0), mesh, strategy)
        params = jax.tree.map(lambda leaf: 8 * leaf, params)
        router = params["router"]["kernel"]
        params["router"]["kernel"] = router + jax.device_put(bias, router.sharding)
        layout = NamedSharding(mesh, strategy.spec("batch", "seq", "act_embed"))
        x, out = (jax.device_put(array, layout) for array in (x, out))

        def loss(params, x):
            with strategy.active():
                result = nnx.merge(module, params)(x.astype(dtype), None)[0]
            return (result.astype(jnp.float32) * out).sum(), result

        (_, result), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return jax.tree.map(np.asarray, (result, gradients))


def example(uneven):
    rng = np.random.default_rng(0)
    x, out = (rng.standard_normal((BATCH, SEQ, CONFIG.hidden_size)).astype(np.float32) for _ in range(2))
    bias = np.zeros((CONFIG.hidden_size, 8), np.float32)
    if uneven:  # all tokens to the first two experts, which one device holds
        x[..., 0], bias[0, :2] = 1.0, 12.0
    return bias, x, out


@pytest.mark.parametrize(
    ("sizes", "uneven", "piece"),
    [(MESHES[0], False, 2048), (MESHES[0], True, 5), (MESHES[1], True, 8), (MESHES[2], False, 1)],
)
def test_results_and_gradients_are_those_of_one_device(monkeypatch, sizes, uneven, piece):
    monkeypatch.setattr(traveling_tokens, "PIECE", piece)
    expected = run(make_mesh({}, jax.devices()[:1]), REPLICATED, *example(uneven))
    found = run(make_mesh(sizes), STRATEGY, *example(uneven))
    for own, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


def test_sixteen_bits_add_up_the_gradients_of_pieces_in_float32(monkeypatch):
    """Cut into many pieces, 16-bit gradients of the experts differ from those of one piece by no more than one rounding."""
    mesh, found = make_mesh(MESHES[0]), {}
    for piece in (2048, 1):
        monkeypatch.setattr(traveling_tokens, "PIECE", piece)
        found[piece] = run(mesh, STRATEGY, *example(False), dtype="bfloat16")[1][0]["experts"]["down"]["kernel"]
    assert _rms(found[1] - found[2048]) <= 2**-8 * _rms(found[2048])


def _rms(x):
    return np.sqrt(np.mean(np.square(x)))
