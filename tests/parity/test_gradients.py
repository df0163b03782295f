"""Gradients of every parameter against torch on transformers, to 1e-4 relative, and a mixture's router losses to 1e-5."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import llmtune
from checkpoints_convert.hf_names import tensors
from llmtune.models.config import Experts, ModelConfig
from llmtune.models.moe import MoE
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.sharding import make_mesh
from llmtune.transforms import weights_by_path
from tests.parity.reference import MODELS, load_reference, save_model

ROWS, LENGTH, PADDING = 8, 96, (0, 17, 40, 90, 0, 1, 60, 33)
CHOSEN = (
    "tied", "biases", "ministral, interleaved windows", "ministral 3", "mixtral",
)  # fmt: skip
TOP_ONE = "mixtral with a window, one of three"
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 200,
    "intermediate_size": 96,
}


def batch_of(vocab):
    """Left-padded rows; what follows padding is no target."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(12, vocab, (ROWS, LENGTH)).astype(
        np.int32
    )  # torch trains no embedding of a pad_token_id (11)
    index = np.arange(LENGTH)[None]
    padding = np.array(PADDING)[:, None]
    segments = (index >= padding).astype(np.int32)
    labels = np.where((index > padding) & (rng.random(tokens.shape) < 0.8), tokens, -100).astype(np.int32)
    positions = np.maximum(index - padding, 0).astype(np.int32)
    return {"tokens": tokens * segments, "labels": labels, "segment_ids": segments, "positions": positions}


WITH_GRADIENT = functools.partial(jax.value_and_grad, has_aux=True)


def our_step(model, batch, differentiate=WITH_GRADIENT):
    """(loss, metrics, gradient of the mean loss) as the train step sees them."""

    def mean(params, batch):
        with model.strategy.active():
            loss, weight, metrics = next_token_loss(model.bind(params), batch)
        return loss / weight, {name: value / weight for name, value in metrics.items()}

    layout = jax.sharding.NamedSharding(model.mesh, model.strategy.spec("batch", "seq"))
    with jax.set_mesh(model.mesh):
        placed = {name: jax.device_put(rows, layout) for name, rows in batch.items()}
        (loss, metrics), gradient = jax.jit(differentiate(mean))(model.params, placed)
    return float(loss), {name: float(value) for name, value in metrics.items()}, jax.device_get(gradient)


def their_step(reference, batch):
    """(loss, the model's output) after a backward pass, with the router's loss where there is one."""
    mask = torch.tensor(batch["segment_ids"])
    more = {"output_router_logits": True} if getattr(reference.config, "num_local_experts", None) else {}
    out = reference(
        torch.tensor(batch["tokens"]).long(), attention_mask=mask, position_ids=torch.tensor(batch["positions"]).long(),
        labels=torch.tensor(batch["labels"]).long(), **more,
    )  # fmt: skip
    out.loss.backward()
    return out


def in_double(router, hidden):
    """MixtralTopKRouter.forward without its rounding to float32."""
    logits = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
    weights, chosen = torch.topk(torch.softmax(logits, dim=-1), router.top_k, dim=-1)
    return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


def their_gradients(reference):
    """By the names of files: experts, which the modules hold in two tensors, one by one."""
    found = {}
    for name, parameter in reference.named_parameters():
        if parameter.grad is None:
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(parameter.grad):
                below = name.replace("mlp.experts.gate_up_proj", f"block_sparse_moe.experts.{expert}")
                found[f"{below}.w1.weight"], found[f"{below}.w3.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(parameter.grad):
                below = name.replace("mlp.experts.down_proj", f"block_sparse_moe.experts.{expert}")
                found[f"{below}.w2.weight"] = down
        else:
            found[name.replace("mlp.gate.weight", "block_sparse_moe.gate.weight")] = parameter.grad
    return found


def assert_same_gradients(config, ours, theirs):
    by_path = weights_by_path(ours)
    assert {tensor.name for tensor in tensors(config)} <= set(theirs)
    for tensor in tensors(config):
        own = by_path[tensor.path][tensor.index]
        own, peer = (own.T if tensor.transposed else own), theirs[tensor.name].numpy()
        assert np.linalg.norm(own - peer) <= 1e-4 * np.linalg.norm(peer) + 1e-9, tensor.name


def compare(name, directory, strategy=None, precise=lambda reference: reference, **more):
    save_model(name, directory, **more)
    model, reference = llmtune.load(directory, strategy=strategy), precise(load_reference(directory))
    batch = batch_of(model.config.vocab_size)
    loss, metrics, gradient = our_step(model, batch)
    out = their_step(reference, batch)
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)
    assert_same_gradients(model.config, gradient, their_gradients(reference))
    return model, loss, metrics, out


@pytest.mark.parametrize("name", CHOSEN)
def test_every_parameter(name, tmp_path):
    compare(name, tmp_path)


def test_one_expert_of_three_against_double(tmp_path, monkeypatch):
    """Where one expert is chosen its weight is p / p: in float32 torch's router gradient is mostly the rounding of that."""
    monkeypatch.setattr(MixtralTopKRouter, "forward", in_double)

    def precise(reference):
        reference.set_experts_implementation("eager")  # torch's grouped product knows no double
        return reference.double()

    compare(TOP_ONE, tmp_path, precise=precise)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*CHOSEN, TOP_ONE)])
def test_every_parameter_of_every_other_model(name, tmp_path):
    compare(name, tmp_path)


def test_router_losses_with_padding_left_out(tmp_path):
    _, loss, metrics, out = compare(TOP_ONE, tmp_path, router_aux_loss_coef=0.5)
    assert metrics["aux_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert loss == pytest.approx(metrics["cross_entropy"] + 0.5 * metrics["aux_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "strategy", ["expert", *(pytest.param(s, marks=pytest.mark.nightly) for s in ("fsdp", "tensor"))]
)
def test_experts_spread_over_eight_devices(strategy, tmp_path):
    model, *_ = compare("mixtral", tmp_path, strategy=strategy, **SIZES)
    assert model.mesh.size == 8


def test_a_router_z_loss(tmp_path):
    """ST-MoE's equation 5 over the tokens of all layers, from transformers' router logits."""
    directory = save_model("mixtral", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "router_z_loss_coef": 0.1}))
    model = llmtune.load(directory)
    batch = batch_of(model.config.vocab_size)
    loss, metrics, _ = our_step(model, batch, lambda mean: lambda *given: (mean(*given), ()))
    out = their_step(load_reference(directory), batch)
    logits = np.stack([layer.detach().numpy() for layer in out.router_logits]).astype(np.float64)
    squares = np.log(np.exp(logits).sum(-1)) ** 2
    expected = squares[:, batch["segment_ids"].reshape(-1) > 0].mean()
    assert metrics["z_loss"] == pytest.approx(expected, rel=1e-5)
    parts = metrics["cross_entropy"] + 0.02 * metrics["aux_loss"] + 0.1 * metrics["z_loss"]
    assert loss == pytest.approx(parts, rel=1e-6)


def test_routing_agrees_on_ten_thousand_tokens():
    """Top-k indices and weights against transformers' router, in float32."""
    own = MoE(ModelConfig("MixtralForCausalLM", 8, 32, 16, 1, 2, 2, 16, experts=Experts(8, 2, 0.0)))
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=32, num_local_experts=8))
    rng = np.random.default_rng(0)
    weight, x = (
        0.2 * rng.standard_normal((8, 32)).astype(np.float32),
        rng.standard_normal((1, 10_000, 32)).astype(np.float32),
    )
    theirs.weight.data = torch.tensor(weight)
    graphdef, state = nnx.split(own)
    params = nnx.to_pure_dict(state)
    params["router"]["kernel"] = jnp.asarray(weight.T)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        weights, chosen, *_ = nnx.merge(graphdef, params).route(jnp.asarray(x))
    _, expected, indices = theirs(torch.tensor(x))
    np.testing.assert_array_equal(chosen[0], indices)
    np.testing.assert_allclose(weights[0], expected.detach(), atol=1e-6)
