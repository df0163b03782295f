"""Hugging Face -> llmtune -> Hugging Face: byte-equal tensors, the same keys, and transformers loads the result."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import llmtune
from tests.parity.reference import MODELS, save_model


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_byte_equal(name, dtype, tmp_path):
    source = save_model(name, tmp_path / "hf", dtype=dtype)
    llmtune.load(source).save(tmp_path / "out")
    assert_same_bytes(source, tmp_path / "out")
    assert json.loads((source / "config.json").read_text()) == json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )


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
