"""PiSSA and OLoRA: what they take out is what peft takes out, and their export is a plain LoRA on the plain base."""

import functools

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import llmtune
from llmtune import pretrained
from llmtune.model import Model, build_params
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.transforms import INITIAL, dora, lora
from llmtune.weights import LoRA
from tests.parity.reference import save_model

TARGETS, TOKENS = ["q_proj", "down_proj"], np.random.default_rng(0).integers(3, 199, (2, 30))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model("gqa untied", tmp_path_factory.mktemp("base") / "hf", num_hidden_layers=2)


def adapted(base, transform):
    source = pretrained.open_source(str(base))
    graphdef, declared = declare(source.config)
    mesh = make_mesh({}, jax.devices()[:1])
    params = build_params(source, declared, transform, mesh, REPLICATED, dtype="float32")
    bind = functools.partial(LanguageModel, graphdef)
    return Model(source.config, params, None, source, mesh, REPLICATED, bind)


@pytest.mark.parametrize("name", list(INITIAL))
def test_it_takes_out_what_peft_takes_out_and_is_exported_as_plain_lora(base, tmp_path, name):
    model = adapted(base, lora(rank=4, alpha=6, targets=TARGETS, initial=INITIAL[name], rslora=True))
    plain = llmtune.load(base).logits(TOKENS)
    np.testing.assert_allclose(model.logits(TOKENS), plain, atol=1e-4)

    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=name, use_rslora=True)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    layers = model.params["layers"][0]
    for path, module in (("attention/q", "self_attn.q_proj"), ("mlp/down", "mlp.down_proj")):
        room, matrix = path.split("/")
        ours = layers[room][matrix]["kernel"]
        taken = np.asarray(ours.scale)[:, None, None] * (np.asarray(ours.a) @ np.asarray(ours.b))
        for number in range(2):
            layer = theirs.get_submodule(f"base_model.model.model.layers.{number}.{module}")
            np.testing.assert_allclose(taken[number], layer.get_delta_weight("default").detach().numpy().T, atol=1e-5)

    moved = layers["attention"]["q"]["kernel"]
    layers["attention"]["q"]["kernel"] = LoRA(**{**vars(moved), "b": moved.b + 0.1})
    expected = model.logits(TOKENS)
    assert np.abs(expected - plain).max() > 0.05
    model.save_adapter(tmp_path / "adapter")
    model.save(tmp_path / "merged")
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        np.testing.assert_allclose(read(torch.tensor(TOKENS)).logits.numpy(), expected, atol=1e-4)
    for again in (llmtune.load(base, adapters=[tmp_path / "adapter"]), llmtune.load(tmp_path / "merged")):
        np.testing.assert_allclose(again.logits(TOKENS), expected, atol=1e-4)


def test_dora_begins_from_pissa_too(base, tmp_path):
    model = adapted(base, dora(rank=4, alpha=6, targets=TARGETS, initial=INITIAL["pissa"], layers=[1]))
    plain = llmtune.load(base).logits(TOKENS)
    np.testing.assert_allclose(model.logits(TOKENS), plain, atol=1e-4)
    model.save_adapter(tmp_path / "adapter")
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        np.testing.assert_allclose(read(torch.tensor(TOKENS)).logits.numpy(), plain, atol=1e-4)
