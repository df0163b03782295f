"""`modules_to_save` of peft there, the same weights here: equal logits to 1e-4, equal bytes, both ways."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import llmtune
from tests.parity.reference import save_model

TOKENS = np.random.default_rng(0).integers(3, 199, (2, 60))
TYING = {"ensure_weight_tying": True}
SAVED = {  # base, rows of its vocabulary when it was adapted, what peft is told
    "embedding and head": ("gqa untied", 199, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "every norm": ("gqa untied", 199, {"modules_to_save": ["norm"]}),
    "the last norm and a matrix": ("gqa untied", 199, {"modules_to_save": ["model.norm", "down_proj"]}),
    "a grown vocabulary": ("gqa untied", 256, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a cut vocabulary": ("gqa untied", 197, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": ("tied", 199, {"modules_to_save": ["embed_tokens"], **TYING}),
    "tied, by the head's name": ("tied", 199, {"modules_to_save": ["lm_head"], **TYING}),
    "tied and grown": ("tied", 256, {"modules_to_save": ["embed_tokens", "lm_head"], **TYING}),
    "tied, one adapter for both ends": (
        "tied",
        199,
        {"lora_alpha": 1, "target_modules": ["q_proj", "embed_tokens", "lm_head"], **TYING},
    ),
    "tied, one adapter, by the head's name": (
        "tied",
        199,
        {"lora_alpha": 1, "target_modules": ["q_proj", "lm_head"], **TYING},
    ),
    "tied and grown, one adapter": (
        "tied",
        256,
        {"lora_alpha": 1, "target_modules": ["q_proj", "embed_tokens"], **TYING},
    ),
    "the head and factors on it": ("gqa untied", 199, {"target_modules": ["q_proj", "lm_head"]}),
}


NIGHTLY = (
    "a cut vocabulary", "tied, by the head's name", "the last norm and a matrix", "tied, one adapter, by the head's name",
    "tied and grown, one adapter",
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    return {name: save_model(name, directory / name) for name in ("gqa untied", "tied")}


def resized(base, rows):
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    model.resize_token_embeddings(rows)
    return model


def make_adapter(base, rows, path, **settings):
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    )
    model = get_peft_model(resized(base, rows), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS % 197)).logits.numpy()


def peft_logits(base, rows, adapter):
    return logits(PeftModel.from_pretrained(resized(base, rows), adapter))


GRID = [pytest.param(name, marks=[pytest.mark.nightly] if name in NIGHTLY else []) for name in SAVED]


@pytest.mark.parametrize("name", GRID)
def test_in_and_out_again(bases, tmp_path, name):
    kind, rows, settings = SAVED[name]
    base = bases[kind]
    adapter = make_adapter(base, rows, tmp_path / "theirs", **settings)
    expected = peft_logits(base, rows, adapter)
    model = llmtune.load(base, adapters=[adapter])
    assert model.config.vocab_size == rows
    np.testing.assert_allclose(model.logits(TOKENS % 197), expected, atol=1e-4, rtol=0)

    model.save_adapter(tmp_path / "ours")
    np.testing.assert_allclose(peft_logits(base, rows, tmp_path / "ours"), expected, atol=1e-5, rtol=0)
    one, other = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    repeated = {key for key in one if "modules_to_save" in key or "original_module" in key}
    assert set(one) - repeated == set(other) and len(repeated) in (0, 4)
    for key in other:
        assert one[key].tobytes() == other[key].tobytes(), key

    model.save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == rows and merged.config.tie_word_embeddings == (kind == "tied")
    np.testing.assert_allclose(logits(merged), expected, atol=1e-4, rtol=0)


def test_on_eight_devices(tmp_path):
    """The 256 rows that the adapter brings divide over the devices; the base's 199 do not, and need not."""
    wide = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    base = save_model("gqa untied", tmp_path / "hf", **wide)
    adapter = make_adapter(base, 256, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    expected = peft_logits(base, 256, adapter)
    model = llmtune.load(base, adapters=[adapter], strategy="tensor")
    assert len(model.params["embed"]["table"].sharding.device_set) == 8
    np.testing.assert_allclose(model.logits(TOKENS % 197), expected, atol=1e-4, rtol=0)


def change(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def cut_rows(tensors, name):
    tensors[PREFIX + name] = tensors[PREFIX + name][:-1].copy()


PREFIX = "base_model.model."
DAMAGES = {
    "a layer is missing": (lambda t: t.pop(PREFIX + "model.layers.1.input_layernorm.weight"), "for every layer"),
    "another width": (lambda t: t.update({PREFIX + "model.norm.weight": np.ones(47, np.float32)}), "another base model"),
    "an unknown module": (lambda t: t.update({PREFIX + "model.pooler.weight": np.ones(48, np.float32)}), "does not have"),
    "two sizes": (lambda t: cut_rows(t, "lm_head.weight"), "differ in size"),
    "one end of a new size": (
        lambda t: (t.pop(PREFIX + "lm_head.weight"), cut_rows(t, "model.embed_tokens.weight")), "resized"
    ),
    "twice": (
        lambda t: t.update({PREFIX + "lm_head.modules_to_save.weight": t[PREFIX + "lm_head.weight"] + 1}), "are one weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(DAMAGES))
def test_what_does_not_fit_is_refused(bases, tmp_path, case, refusal):
    modules = ["embed_tokens", "lm_head", "norm"]
    adapter = make_adapter(bases["gqa untied"], 199, tmp_path / "adapter", modules_to_save=modules)
    damage, said = DAMAGES[case]
    change(adapter, damage)
    assert said in refusal(adapter, lambda: llmtune.load(bases["gqa untied"], adapters=[adapter]))


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_ends_that_trained_apart_need_an_untied_base(bases, tmp_path, modules, refusal):
    adapter = make_adapter(bases["tied"], 199, tmp_path / "adapter", modules_to_save=modules)
    said = refusal(adapter, lambda: llmtune.load(bases["tied"], adapters=[adapter]))
    assert "train it with ensure_weight_tying, or untie the base" in said


def test_ends_that_share_an_adapter_have_the_same_one(bases, tmp_path, refusal):
    targets = {"target_modules": ["q_proj", "lm_head"], **TYING}
    adapter = make_adapter(bases["tied"], 199, tmp_path / "adapter", **targets)
    name = f"{PREFIX}lm_head.lora_A.weight"
    change(adapter, lambda tensors: tensors.update({name: tensors[name] + 1}))
    said = refusal(adapter, lambda: llmtune.load(bases["tied"], adapters=[adapter]))
    assert "lm_head.lora_A.weight is not" in said and "both ends share one adapter" in said


def test_the_settings_are_those_of_peft(bases, tmp_path):
    adapter = make_adapter(bases["tied"], 199, tmp_path / "theirs", modules_to_save=["embed_tokens", "norm"], **TYING)
    llmtune.load(bases["tied"], adapters=[adapter]).save_adapter(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["embed_tokens", "input_layernorm", "post_attention_layernorm", "model.norm"]
    assert written["ensure_weight_tying"] is True
