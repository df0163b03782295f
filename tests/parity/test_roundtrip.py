"""Hugging Face -> llmtune -> Hugging Face: byte-equal tensors, the same keys, and transformers loads the result."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import llmtune
from tests.parity.reference import MODELS, load_reference, save_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return found


def assert_same_bytes(one, other):
    a, b = tensors(one), tensors(other)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", list(MODELS))
def test_byte_equal(name, tmp_path):
    dtype = DTYPES[list(MODELS).index(name) % 3]
    byte_equal(name, dtype, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_byte_equal_in_every_dtype(name, dtype, tmp_path):
    byte_equal(name, dtype, tmp_path)


def byte_equal(name, dtype, tmp_path):
    source = save_model(name, tmp_path / "hf", dtype=dtype)
    llmtune.load(source).save(tmp_path / "out")
    assert_same_bytes(source, tmp_path / "out")
    assert json.loads((source / "config.json").read_text()) == json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )


def test_a_vision_tower_is_carried_through_untouched(tmp_path):
    """In both spellings: that of files, and that of transformers' modules."""
    source = save_model("mistral 3, text tower", tmp_path / "hf", dtype=torch.bfloat16)
    found = tensors(source)
    modules = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.", "model.vision_tower.")
        .replace("multi_modal_projector.", "model.multi_modal_projector."): tensor.clone()
        for name, tensor in found.items()
    }
    newer = shutil.copytree(source, tmp_path / "newer")
    save_file(modules, newer / "model.safetensors", metadata={"format": "pt"})
    for directory in (source, newer):
        model = llmtune.load(directory)
        model.save(tmp_path / f"{directory.name} out")
        assert_same_bytes(directory, tmp_path / f"{directory.name} out")
    tokens = np.arange(11, 190)[None]
    with torch.no_grad():
        expected = load_reference(tmp_path / "newer out")(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-4)
    model.save(tmp_path / "half", dtype="float16")
    written = tensors(tmp_path / "half")
    assert {name: written[name].dtype for name in written} == {
        name: torch.bfloat16 if "vision_tower" in name or "projector" in name else torch.float16 for name in modules
    }


@pytest.mark.parametrize("strategy", ["fsdp", "expert"])
def test_experts_in_many_files_onto_eight_devices_and_back(strategy, tmp_path):
    source = save_model("mixtral", tmp_path / "hf", max_shard_size="200KB", hidden_size=64, num_attention_heads=8)
    model = llmtune.load(source, strategy=strategy)
    assert len(list(source.glob("*.safetensors"))) > 3 and model.mesh.size == 8
    model.save(tmp_path / "out")
    assert_same_bytes(source, tmp_path / "out")


@pytest.mark.parametrize("strategy", ["fsdp", "tensor"])
def test_sharded_files_onto_eight_devices_and_back(strategy, tmp_path):
    source = save_model("tied", tmp_path / "hf", max_shard_size="60KB", hidden_size=64, num_attention_heads=8,
                        vocab_size=200)  # fmt: skip
    assert len(list(source.glob("*.safetensors"))) > 3
    model = llmtune.load(source, strategy=strategy)
    assert model.mesh.size == 8
    model.save(tmp_path / "out")
    assert_same_bytes(source, tmp_path / "out")


def test_transformers_loads_what_was_saved(tmp_path, stories):
    llmtune.load(stories).save(tmp_path / "out")
    tokens = torch.arange(3, 400)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(p)(tokens).logits for p in (stories, tmp_path / "out"))
    assert torch.equal(one, other)
    assert_same_bytes(stories, tmp_path / "out")


def test_a_chosen_dtype_is_written_and_said(tmp_path, stories):
    llmtune.load(stories).save(tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_random_weights_of_a_preset_are_saved_as_a_complete_directory(tmp_path):
    llmtune.load("starter").save(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = np.arange(3, 300)[None]
    with torch.no_grad():
        expected = model.float()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(llmtune.load(tmp_path / "out").logits(tokens), expected, atol=1e-4)
