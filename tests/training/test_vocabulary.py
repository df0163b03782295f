"""Runs that add tokens and train weights in whole: one curve on one and on eight devices, stopped and resumed, one compile."""

import json
import logging

import jax
import numpy as np
import pytest

import llmtune
from llmtune.errors import LlmtuneConfigError
from tests.runs import curve, run_config
from tests.training.interruption import train_until

WORD, CONTROL = "<|think|>", "<|im_start|>"
WHOLE = {"rank": 4, "alpha": 8, "modules_to_save": ["norm"]}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    draw = np.random.default_rng(0)
    words = ["the", "dog", WORD, "ran", "to", "a", "park", "and", "saw"]
    texts = [" ".join(draw.choice(words, 12 + n % 7)) for n in range(24)]
    path.write_text("".join(json.dumps({"prompt": text[:20], "completion": text[20:]}) + "\n" for text in texts))
    return path


def run(directory, model, rows, name="run", data=None, **sections):
    own = {"add_tokens": [WORD], "add_special_tokens": [CONTROL]} if data is None else data
    defaults = {
        "data": {"train": str(rows), "sequence_length": 64, **own},
        "adapt": WHOLE,
        "train": {"steps": 6, "batch_size": 4, "dtype": "float32"},
        "checkpoint": {"every": 2},
    }
    return run_config(directory, model, rows, name=name, **{**defaults, **sections})


@pytest.mark.parametrize("strategy", [pytest.param("fsdp", marks=pytest.mark.nightly), "fsdp_tensor"])
def test_eight_devices_train_like_one_and_a_run_moves_between_them(stories, rows, tmp_path, strategy):
    whole = curve(run(tmp_path, stories, rows, "one"))
    mesh = {"mesh": {"fsdp": 2, "tensor": 4}} if strategy == "fsdp_tensor" else {}
    sharded = run(tmp_path, stories, rows, "eight", sharding={"strategy": strategy, **mesh})
    train_until(sharded, 3, devices=8)
    losses, norms = curve(run(tmp_path, stories, rows, "eight"))  # from the checkpoint of step 2, on one device
    np.testing.assert_allclose(losses, whole[0], rtol=1e-5)
    np.testing.assert_allclose(norms, whole[1], rtol=1e-4)


def test_stopped_and_resumed_the_curve_is_bit_identical(stories, rows, tmp_path):
    whole = curve(run(tmp_path, stories, rows, "whole"))
    stopped = run(tmp_path, stories, rows, "stopped")
    train_until(stopped, 3)
    np.testing.assert_array_equal(curve(stopped)[0], whole[0])
    adapters = [(tmp_path / n / "export/adapter/adapter_model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert adapters[0] == adapters[1]


def test_one_compile_per_run(stories, rows, tmp_path, caplog):
    jax.config.update("jax_log_compiles", True)
    jax.config.update("jax_enable_compilation_cache", False)  # of the test suite: it would hide a compilation
    try:
        with caplog.at_level(logging.WARNING):
            llmtune.train(run(tmp_path, stories, rows), devices=jax.devices()[:1])
    finally:
        jax.config.update("jax_log_compiles", False)
        jax.config.update("jax_enable_compilation_cache", True)
    said = [
        r.getMessage() for r in caplog.records if "Finished jaxpr to MLIR module conversion jit(step)" in r.getMessage()
    ]
    assert len(said) == 1, said


REFUSED = {
    "an empty token": ({"add_tokens": [" "]}, WHOLE, "data.add_tokens: ' ' is empty"),
    "twice": ({"add_tokens": [WORD], "add_special_tokens": [WORD]}, WHOLE, "data.add_special_tokens: .* is given twice"),
    "a control token": ({"add_tokens": ["</s>"]}, WHOLE, "data.add_tokens: '</s>' is a control token already"),
    "a multiple of zero": ({"add_tokens": [WORD], "pad_vocabulary_to": 0}, WHOLE, "data.pad_vocabulary_to: 0 must be"),
    "a module of no model": ({}, {"modules_to_save": ["pooler"]}, "adapt.modules_to_save: 'pooler' names no weight"),
    "both ways": ({}, {"modules_to_save": ["q_proj"]}, "adapt.modules_to_save: .*/q/kernel is among adapt.targets too"),
    "an adapter's own": ({}, {"from": "x", "modules_to_save": ["norm"]}, "the adapter that adapt.from names says this"),
    "an adapter's vocabulary": ({"add_tokens": [WORD]}, {"from": "x"}, "data.add_tokens: an adapter that is continued"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_is_refused_before_anything_is_written(stories, rows, tmp_path, case):
    data, adapt, said = REFUSED[case]
    with pytest.raises(LlmtuneConfigError, match=said):
        llmtune.train(run(tmp_path, stories, rows, data=data, adapt=adapt))
    assert not (tmp_path / "run").exists()


def test_a_size_that_does_not_divide_names_the_tensor(stories, rows, tmp_path):
    own = {"add_tokens": [WORD], "pad_vocabulary_to": 1}
    tensor = {"strategy": "fsdp_tensor", "mesh": {"fsdp": 2, "tensor": 4}}
    with pytest.raises(ValueError, match="embed/table: axis 'vocab' of size 513 cannot be split 4 ways"):
        llmtune.train(run(tmp_path, stories, rows, data=own, sharding=tensor))
