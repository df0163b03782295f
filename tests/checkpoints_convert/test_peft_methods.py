"""The other methods of peft, in and out: the same logits to 1e-4 as peft's own, tensors and settings that peft reads."""

import json

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.errors import LlmtuneError
from tests.parity.reference import save_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
ADAPTERS = {  # name -> (base, peft's configuration)
    "DoRA": ("gqa untied", LoraConfig(**LORA, target_modules=LINEAR, use_dora=True)),
    "DoRA with patterns, the head too": ("gqa untied", LoraConfig(
        **LORA, target_modules=["q_proj", "down_proj", "lm_head"], use_dora=True, use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2}, layers_to_transform=[0, 1])),
    "IA3": ("gqa untied", IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False)),
    "IA3 in some layers": ("gqa untied", IA3Config(
        task_type="CAUSAL_LM", target_modules=r".*layers\.[02]\.(self_attn\.q|mlp\.up)_proj", feedforward_modules=[],
        init_ia3_weights=False)),
    "VeRA": ("gqa untied", VeraConfig(r=6, task_type="CAUSAL_LM", target_modules=LINEAR, init_weights=False)),
    "VeRA on two": ("gqa untied", VeraConfig(
        r=6, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], layers_to_transform=[1], init_weights=False)),
    "the embedding and the head": ("gqa untied", LoraConfig(
        **LORA, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "the embedding of a tied model": ("tied", LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens"])),
    "the head of a tied model": ("tied", LoraConfig(**LORA, target_modules=["lm_head"])),
    "all experts": ("mixtral", LoraConfig(**LORA, target_modules=["q_proj"], target_parameters=FUSED)),
    "experts with patterns": ("mixtral", LoraConfig(
        **LORA, target_modules=[], target_parameters=FUSED[1:], rank_pattern={"model.layers.0.mlp.experts.down_proj": 2},
        alpha_pattern={"layers.1.mlp.experts.down_proj": 3})),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 199, (2, 60))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    more = {"mixtral": {"num_local_experts": 3, "num_hidden_layers": 2}}
    return {
        name: save_model(name, directory / name, **more.get(name, {})) for name in ("gqa untied", "tied", "mixtral")
    }


def make_adapter(base, path, config):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():  # of a size at which mistakes show, and the model is still one
        if "magnitude" in name or "ia3" in name:
            parameter.data = parameter.data * (1 + 0.3 * torch.randn_like(parameter))
        elif "lora_" in name or "lambda_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def peft_logits(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


NIGHTLY = {"DoRA", "IA3 in some layers", "VeRA on two", "experts with patterns", "the head of a tied model"}


@pytest.mark.parametrize(
    "name", [pytest.param(own, marks=pytest.mark.nightly) if own in NIGHTLY else own for own in ADAPTERS]
)
def test_in_and_out_again(bases, tmp_path, name):
    kind, config = ADAPTERS[name]
    base, adapter = bases[kind], make_adapter(bases[kind], tmp_path / "theirs", config)
    model, expected = llmtune.load(base, adapters=[adapter]), peft_logits(base, adapter)
    assert np.abs(expected - llmtune.load(base).logits(TOKENS)).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-4, rtol=0)
    model.save_adapter(tmp_path / "ours")
    np.testing.assert_allclose(peft_logits(base, tmp_path / "ours"), expected, atol=1e-5, rtol=0)
    one, other = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert set(one) - set(other) <= {key for key in one if "base_layer.weight" in key}
    for key in other:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    model.save(tmp_path / "merged")
    np.testing.assert_allclose(llmtune.load(tmp_path / "merged").logits(TOKENS), expected, atol=1e-4, rtol=0)


def test_experts_whose_gate_and_up_have_parted_are_one_pair_of_both_ranks(bases, tmp_path):
    base = bases["mixtral"]
    adapter = make_adapter(base, tmp_path / "theirs", ADAPTERS["all experts"][1])
    model = llmtune.load(base, adapters=[adapter])
    experts = model.params["layers"][0]["mlp"]["experts"]
    experts["up"]["kernel"] = experts["up"]["kernel"].__class__(
        **{**vars(experts["up"]["kernel"]), "a": experts["up"]["kernel"].a * 1.5}
    )
    expected = model.logits(TOKENS)
    model.save_adapter(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["rank_pattern"]
    np.testing.assert_allclose(peft_logits(base, tmp_path / "ours"), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        llmtune.load(base, adapters=[tmp_path / "ours"]).logits(TOKENS), expected, atol=1e-4, rtol=0
    )


DAMAGES = {  # adapter, damage to its tensors and settings, what is said
    "no projections": ("VeRA", lambda t, s: (t.pop("base_model.vera_A"), t.pop("base_model.vera_B")), "from torch's generator"),
    "half a VeRA": ("VeRA", lambda t, s: t.pop(next(k for k in t if "lambda_d" in k)), "the adapter is incomplete"),
    "a gain of another width": (
        "IA3", lambda t, s: t.update({k: v[:-1].copy() for k, v in t.items() if v.shape[0] > 1}), "another base model"),
    "DoRA without lengths": ("DoRA", lambda t, s: t.pop(next(k for k in t if "magnitude" in k)), "do not fit each other"),
    "lengths without DoRA": ("DoRA", lambda t, s: s.update(use_dora=False), "do not fit each other"),
    "a module of another model": (
        "IA3", lambda t, s: t.update({k.replace("layers.0", "layers.7"): v for k, v in t.items()}), "does not have"),
    "experts of another number": (
        "all experts", lambda t, s: t.update({k: v[:-1].copy() for k, v in t.items() if "experts.lora_A" in k}), "another base"),
    "a method of tomorrow": ("IA3", lambda t, s: s.update(peft_type="BOFT"), "peft_type is 'BOFT'; only LORA"),
    "a field of tomorrow": ("VeRA", lambda t, s: s.update(strength=3), "strength is 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(DAMAGES))
def test_adapters_that_do_not_fit_are_refused(bases, tmp_path, case):
    name, damage, said = DAMAGES[case]
    kind, config = ADAPTERS[name]
    adapter = make_adapter(bases[kind], tmp_path / "adapter", config)
    tensors, path = load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    damage(tensors, settings)
    save_file(tensors, adapter / "adapter_model.safetensors")
    path.write_text(json.dumps(settings))
    with pytest.raises(LlmtuneError) as caught:
        llmtune.load(bases[kind], adapters=[adapter])
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
