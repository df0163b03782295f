"""Methods on experts, of which peft has LoRA alone: our own directories carry the others, and say so by their type."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import PeftConfig
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import llmtune
from checkpoints_convert.peft import write_adapter
from checkpoints_convert.peft.bottleneck import Branches
from checkpoints_convert.peft.directory import open_peft
from checkpoints_convert.peft.factors import Factors
from checkpoints_convert.peft.lora import LoraValues
from checkpoints_convert.peft.vectors import Gains, VeraValues
from checkpoints_convert.peft.vllm import findings
from llmtune import pretrained
from llmtune.errors import LlmtuneFormatError
from llmtune.models.decoder import declare
from llmtune.transforms import dora, ia3, sequential_adapters, vera
from tests.parity.reference import save_model

TOKENS = np.random.default_rng(0).integers(3, 199, (2, 40))
TRANSFORMS = {
    "LORA": dora(rank=4, alpha=6, targets=["q_proj", "experts"]),
    "IA3": ia3(targets=["k_proj", "experts"]),
    "VERA": vera(rank=6, targets=["q_proj", "experts"]),
    "LLMTUNE_SEQUENTIAL": sequential_adapters("houlsby", size=4),
}
FORMS = {"LORA": "LLMTUNE_DORA", "IA3": "LLMTUNE_IA3", "VERA": "LLMTUNE_VERA"}
NAMES = {"LORA": "dora", "IA3": "ia3", "VERA": "vera", "LLMTUNE_SEQUENTIAL": "houlsby"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "mixtral"
    return save_model("mixtral", directory, num_local_experts=3, num_hidden_layers=2)


def values_of(method, config):
    """What a trained adapter holds: shapes from the transform, noise around where it begins."""
    rng = np.random.default_rng(0)
    specs = TRANSFORMS[method].init(declare(config)[1])
    drawn = jax.tree.map(lambda spec: (0.1 * rng.standard_normal(spec.shape)).astype(np.float32), specs)
    if method == "LORA":
        scale = {path: np.full(own["scale"].shape, 1.5, np.float32) for path, own in drawn.items()}
        return LoraValues(
            {p: Factors(o["a"], o["b"], scale[p], None, 1 + o["magnitude"] ** 2) for p, o in drawn.items()}, False
        )
    if method == "IA3":
        side = {path: "in" if "down" in path else "out" for path in drawn}
        return {
            p: Gains(1 + 3 * own["gain"], np.ones(own["on"].shape, np.float32), side[p]) for p, own in drawn.items()
        }
    if method == "VERA":
        inner, outer = ({path: own[name] for path, own in drawn["own"].items()} for name in ("inner", "outer"))
        return VeraValues(*(20 * drawn["shared"][name] for name in "ab"), inner, outer)
    return Branches({path: {name: 3 * value for name, value in own.items()} for path, own in drawn.items()}, {})


BY_NIGHT = ("IA3", "VERA")


@pytest.fixture(
    scope="module",
    params=[pytest.param(own, marks=pytest.mark.nightly) if own in BY_NIGHT else own for own in TRANSFORMS],
)
def written(request, base, tmp_path_factory):
    method, directory = request.param, tmp_path_factory.mktemp("adapter") / "first"
    config = pretrained.open_source(str(base)).config
    write_adapter(directory, method, values_of(method, config), config, base=str(base))
    return method, directory


def test_in_and_out_again_and_merged_for_transformers(base, written, tmp_path):
    method, directory = written
    model = llmtune.load(base, adapters=[directory])
    logits = model.logits(TOKENS)
    assert np.abs(logits - llmtune.load(base).logits(TOKENS)).max() > 0.1
    model.save_adapter(tmp_path / "again")
    one, other = (load_file(path / "adapter_model.safetensors") for path in (directory, tmp_path / "again"))
    assert set(one) == set(other) and any("experts.2.w2" in key for key in one)
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)
    assert pretrained.load_adapter(directory, model.config).method == NAMES[method]
    if method != "LLMTUNE_SEQUENTIAL":  # what is linear stands in a plain model
        model.save(tmp_path / "merged")
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(logits, theirs, atol=1e-4, rtol=0)


def test_peft_and_vllm_are_told_by_name(written):
    method, directory = written
    form = json.loads((directory / "adapter_config.json").read_text())["peft_type"]
    assert form == FORMS.get(method, method)
    with pytest.raises(KeyError, match=form):
        PeftConfig.from_pretrained(directory)
    note = pretrained.form_note(directory)
    assert note.startswith("peft has no form for") and form in note
    (found,) = findings(open_peft(directory))
    merge = "serve the merged model" if method in FORMS else "cannot be merged"
    assert found.blocks and form in found.what and merge in found.mend


def test_an_expert_that_lacks_a_part_is_named(base, written, tmp_path):
    method, directory = written
    config = pretrained.open_source(str(base)).config
    tensors = load_file(directory / "adapter_model.safetensors")
    last = [key for key in tensors if "layers.1.block_sparse_moe.experts.2.w2" in key]
    if method == "IA3":
        tensors[last[0]] = tensors[last[0]][..., :-1].copy()
    else:
        tensors.pop(last[0])
    (tmp_path / "cut").mkdir()
    save_file(tensors, tmp_path / "cut" / "adapter_model.safetensors")
    (tmp_path / "cut" / "adapter_config.json").write_bytes((directory / "adapter_config.json").read_bytes())
    with pytest.raises(LlmtuneFormatError) as caught:
        pretrained.load_adapter(tmp_path / "cut", config)
    assert "\n" not in str(caught.value)
    said = {"LLMTUNE_SEQUENTIAL": "layer 1, expert 2", "IA3": "another base model"}.get(method, "is incomplete")
    assert said in str(caught.value)


def test_lora_on_experts_stays_as_peft_has_it(base, tmp_path):
    config = pretrained.open_source(str(base)).config
    values = values_of("LORA", config)
    plain = LoraValues({p: Factors(o.a, o.b, o.scale, None) for p, o in values.factors.items()}, False)
    write_adapter(tmp_path / "lora", "LORA", plain, config, base=str(base))
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["target_parameters"]
    assert pretrained.form_note(tmp_path / "lora") is None
