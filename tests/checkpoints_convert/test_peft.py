"""Adapters of peft here, ours there: the same logits to 1e-4, for every shape that peft writes."""

import json

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM

import llmtune
from checkpoints_convert.peft import directory, lora, write_adapter
from checkpoints_convert.peft.lora import Factors, LoraValues
from llmtune.errors import LlmtuneError
from llmtune.models.config import ModelConfig
from tests.parity.reference import save_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all linear": {"target_modules": LINEAR},
    "rank-stabilised": {"target_modules": LINEAR, "use_rslora": True},
    "two modules": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3},
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
    "the head alone": {"target_modules": ["lm_head"]},
    "ranks and alphas that differ": {
        "target_modules": LINEAR,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 7},
        "alpha_pattern": {"layers.2.mlp.down_proj": 5, "q_proj": 1},
    },
    "by regular expression": {"target_modules": r".*\.layers\.[12]\.(self_attn\.o_proj|mlp\.gate_proj)"},
}
TOKENS = np.random.default_rng(0).integers(3, 199, (2, 100))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model("gqa untied", tmp_path_factory.mktemp("base") / "hf")


def make_adapter(base, path, **settings):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def peft_logits(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    there = {key for key in get_peft_model_state_dict(model) if ".lora_" in key}
    assert there == set(load_file(adapter / "adapter_model.safetensors"))  # no module was adapted besides
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_in_and_out_again(base, tmp_path, name):
    adapter = make_adapter(base, tmp_path / "theirs", **ADAPTERS[name])
    model, expected = llmtune.load(base, adapters=[adapter]), peft_logits(base, adapter)
    assert np.abs(expected - llmtune.load(base).logits(TOKENS)).max() > 1  # the adapter matters
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-4, rtol=0)
    model.save_adapter(tmp_path / "ours")
    np.testing.assert_allclose(peft_logits(base, tmp_path / "ours"), expected, atol=1e-5, rtol=0)
    one, other = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert set(one) == set(other)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    model.save(tmp_path / "merged")
    np.testing.assert_allclose(llmtune.load(tmp_path / "merged").logits(TOKENS), expected, atol=1e-4, rtol=0)


def test_two_adapters_add_up(base, tmp_path):
    paths = [make_adapter(base, tmp_path / name, target_modules=[name]) for name in ("q_proj", "up_proj")]
    model = llmtune.load(base, adapters=paths)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    for path in paths:
        theirs = PeftModel.from_pretrained(theirs, path).merge_and_unload()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-4, rtol=0)
    with pytest.raises(LlmtuneError, match="carries several adapters"):
        paths = [make_adapter(base, tmp_path / name, target_modules=["q_proj"]) for name in ("one", "other")]
        llmtune.load(base, adapters=paths).save_adapter(tmp_path / "out")


def test_sixteen_bit_adapters_are_read_as_peft_reads_them(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    tensors = load_torch(adapter / "adapter_model.safetensors")
    halves = {key: own.to([torch.bfloat16, torch.float16][k % 2]) for k, (key, own) in enumerate(tensors.items())}
    save_torch(halves, adapter / "adapter_model.safetensors")
    model = llmtune.load(base, adapters=[adapter])
    np.testing.assert_allclose(model.logits(TOKENS), peft_logits(base, adapter), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_every_usual_alpha_is_written_as_it_was_meant(rslora, tmp_path):
    config = ModelConfig("LlamaForCausalLM", 8, 128, 8, 1, 1, 1, 128)
    for rank in range(1, 129, 5):
        for alpha in (0.1, 1, 5, 8, 16, 20, 32, 48, 64, 128, 256):
            scale = np.float32(alpha / (rank**0.5 if rslora else rank))
            zeros = np.zeros((1, 128, rank), np.float32)
            factors = {"layers/0/attention/q/kernel": Factors(zeros, zeros.swapaxes(1, 2), np.array([scale]), None)}
            values = LoraValues(factors, rslora)
            write_adapter(tmp_path / f"{alpha}-{rank}", "LORA", values, config, base="")
            written = json.loads((tmp_path / f"{alpha}-{rank}" / "adapter_config.json").read_text())
            assert (written["r"], written["lora_alpha"]) == (rank, alpha)


def test_on_eight_devices(base, tmp_path):
    base = save_model("tied", tmp_path / "hf", hidden_size=64, num_attention_heads=8, num_key_value_heads=8,
                      vocab_size=200)  # fmt: skip
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, rank_pattern={"k_proj": 2})
    expected = peft_logits(base, adapter)
    for strategy in ("fsdp", "tensor"):
        model = llmtune.load(base, adapters=[adapter], strategy=strategy)
        np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-4, rtol=0)


OTHER_METHODS = {  # as peft itself writes them -> the field that says so
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "a LoRA bias": ({"lora_bias": True}, "lora_bias is True"),
    "trained tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
    "repeated layers": ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication is [[0, 2], [1, 3]]"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; it changed the base's weights too"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'; it changed the base's weights too"),
    "LoHa": (LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "peft_type is 'LOHA'"),
}


@pytest.mark.parametrize("name", list(OTHER_METHODS))
def test_other_methods_are_refused_by_name(base, tmp_path, name, refusal):
    method, said = OTHER_METHODS[name]
    if isinstance(method, dict):
        adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **method)
    else:
        adapter = tmp_path / "adapter"
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), method).save_pretrained(adapter)
    assert said in refusal(adapter / "adapter_config.json", load_with, base, adapter)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_initialisers_that_keep_the_base_do_not_matter(base, tmp_path, init):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights=init)
    change(adapter, lambda tensors: tensors.update({key: own + 0.1 for key, own in tensors.items()}))
    expected = peft_logits(base, adapter)
    np.testing.assert_allclose(load_with(base, adapter).logits(TOKENS), expected, atol=1e-4, rtol=0)


def test_every_field_of_peft_is_accounted_for():
    """A field that a later peft adds is refused where it is set; this list says that somebody looked at it."""
    looked_at = {"kasa_config", "use_bdlora", "monteclora_config"}  # each changes the function: refused as unknown
    known = directory.READ | directory.HARMLESS | lora.READ | lora.HARMLESS | set(lora.REFUSED)
    assert not set(LoraConfig().to_dict()) - known - looked_at


WRONG_FIELDS = {
    "peft_type": None, "fan_in_fan_out": True, "use_qalora": True, "a_field_of_tomorrow": {"strength": 2}, "r": 0,
    "lora_alpha": "16", "rank_pattern": {"q_proj": 2.5}, "alpha_pattern": {"(": 1}, "init_lora_weights": ["pissa"],
    "use_dora": 1.5, "kasa_config": {"beta": 1}, "use_bdlora": {"nblocks": 2}, "a\nline": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", list(WRONG_FIELDS))
def test_a_wrong_field_is_named(base, tmp_path, field, refusal):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: WRONG_FIELDS[field]}))
    assert f"{field if field.isprintable() else ascii(field)} is {WRONG_FIELDS[field]!r}; " in refusal(
        path, load_with, base, adapter
    )


def load_with(base, adapter):
    return llmtune.load(base, adapters=[adapter])


def change(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def first_two_ranks(key, matrix):
    return (matrix[:2] if "lora_A" in key else matrix[:, :2]).copy()


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DAMAGES = {
    "one side": (lambda t: t.pop(KEY), "has only lora_B"),
    "another base": (lambda t: t.update({KEY: t[KEY][:, :-1].copy()}), "made for another base model"),
    "another rank": (lambda t: t.update({k: first_two_ranks(k, v) for k, v in t.items()}), "declared with rank 4"),
    "an embedding": (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[KEY]}), "has only lora_A"),
    "another module": (lambda t: t.update({KEY.replace("layers.1", "layers.9"): t[KEY].copy()}), "does not have"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(DAMAGES))
def test_adapters_that_do_not_fit_are_refused(base, tmp_path, case, refusal):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    change(adapter, DAMAGES[case][0])
    assert DAMAGES[case][1] in refusal(adapter, load_with, base, adapter)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"hidden_size": 60}, "made for another base model"), ({"num_hidden_layers": 4}, "does not have")],
    ids=["another width", "more layers"],
)
def test_an_adapter_of_another_base_is_refused(base, tmp_path, more, said, refusal):
    other = save_model("gqa untied", tmp_path / "other", **more)
    adapter = make_adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    assert said in refusal(adapter, load_with, base, adapter)


def test_directories_without_an_adapter(base, tmp_path):
    with pytest.raises(LlmtuneError, match="there; a PEFT adapter directory is needed"):
        llmtune.load(base, adapters=[tmp_path])
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(LlmtuneError, match="pickle: convert it to safetensors"):
        llmtune.load(base, adapters=[adapter])


def test_a_model_without_an_adapter_has_none_to_save(base, tmp_path):
    with pytest.raises(LlmtuneError, match="no adapter"):
        llmtune.load(base).save_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()
