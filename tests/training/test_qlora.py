"""Runs on a quantised base: as good as LoRA, resumed to the bit, and what is refused before anything trains."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.errors import LlmtuneConfigError
from llmtune.weights import NF4, ArraySpec, Int4
from tests.runs import curve, run_config, write_rows
from tests.training.interruption import train_until

ADAPT = {"rank": 8, "alpha": 16}


@pytest.fixture(scope="module")
def rows(batches, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *batches)


def gsm8k_run(directory, assets, model, name, steps, **sections):
    lines = (assets / "data" / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)
    files = {"train": lines[:2000], "validation": lines[2000:2040]}
    for part, own in files.items():
        (directory / f"{part}.jsonl").write_text("".join(own))
    data = {
        **{part: str(directory / f"{part}.jsonl") for part in files}, "sequence_length": 128,
        "format": "prompt_completion", "columns": {"prompt": "question", "completion": "answer"},
    }  # fmt: skip
    options = {"learning_rate": 3e-3, "warmup_steps": 5}
    train = {"steps": steps, "batch_size": 8, "dtype": "float32"}
    return run_config(
        directory,
        model,
        None,
        name,
        data=data,
        adapt=ADAPT,
        optimizer=options,
        train=train,
        evaluate={"every": None},
        **sections,
    )


def held_out(run):
    llmtune.train(run, devices=jax.devices()[:1])
    with open(f"{run.output}/evaluation.json") as file:
        measured = json.load(file)
    return measured["before"]["loss"], measured["after"]["loss"]


@pytest.mark.parametrize("steps", [40, pytest.param(400, marks=pytest.mark.nightly)])
def test_qlora_ends_within_three_percent_of_lora(assets, stories, tmp_path, steps):
    before, lora = held_out(gsm8k_run(tmp_path, assets, stories, "lora", steps))
    _, qlora = held_out(gsm8k_run(tmp_path, assets, stories, "qlora", steps, quantize={"base": "nf4"}))
    print(f"held-out loss {before:.4f} before; LoRA {lora:.4f}, QLoRA {qlora:.4f}")
    assert lora < before - 0.5
    assert abs(qlora / lora - 1) < 0.03


def test_stopped_and_resumed_the_curve_is_bit_identical_and_the_base_is_not_stored(stories, rows, tmp_path):
    def run(name):
        return run_config(
            tmp_path, stories, rows, name, adapt=ADAPT, quantize={"base": "nf4"}, checkpoint={"every": 5},
            train={"steps": 12, "batch_size": 4, "dtype": "bfloat16"},
        )  # fmt: skip

    whole = curve(run("whole"))
    train_until(run("stopped"), 7)
    np.testing.assert_array_equal(curve(run("stopped")), whole)
    saved = sum(file.stat().st_size for file in (tmp_path / "whole/checkpoints/12").rglob("*") if file.is_file())
    trained = json.loads((tmp_path / "whole/run.json").read_text())["model"]["trainable_parameters"]
    assert saved < 1.5 * 3 * 4 * trained  # weights and two moments
    exported = [
        (tmp_path / name / "export/adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")
    ]
    assert exported[0] == exported[1]


@pytest.mark.parametrize("base", ["nf4", "int4", "int8", "fp8"])
@pytest.mark.parametrize("strategy", ["fsdp_torus", "fsdp_tensor"])
@pytest.mark.nightly
def test_eight_devices_train_like_one(stories, rows, tmp_path, strategy, base):
    def run(name, **sharding):
        train = {"steps": 8, "batch_size": 8, "dtype": "float32"}
        return run_config(
            tmp_path, stories, rows, name, adapt=ADAPT, quantize={"base": base}, train=train,
            sharding={"strategy": strategy, **sharding},
        )  # fmt: skip

    one = curve(run("one"))
    mesh = {"mesh": {"fsdp": 2, "tensor": 4}} if strategy == "fsdp_tensor" else {}
    np.testing.assert_allclose(curve(run("eight", **mesh), devices=8)[0], one[0], rtol=1e-5)


def test_a_run_that_begins_with_a_part_of_its_base_trains(stories, rows, tmp_path):
    """What trains is donated to each step, and what was taken out of the base stays."""
    adapt = {**ADAPT, "initial": "olora", "targets": "q_proj"}
    train = {"steps": 3, "batch_size": 4, "dtype": "float32"}
    losses, _ = curve(run_config(tmp_path, stories, rows, adapt=adapt, quantize={"base": "int8"}, train=train))
    assert np.isfinite(losses).all() and len(losses) == 3


def test_a_base_of_two_formats_under_loftq_lies_nearer_to_the_stored_model(stories, rows, tmp_path):
    """The rate of the first step is zero, so that the beginning is what is exported; and the run is read again."""
    quantize = [{"base": "nf4", "targets": "q_proj"}, {"base": "int4", "targets": ["up_proj", "lm_head"]}]
    adapt = {**ADAPT, "targets": ["q_proj", "up_proj"], "untie": True, "initial": "loftq"}
    train = {"steps": 1, "batch_size": 4, "dtype": "float32"}
    run = run_config(tmp_path, stories, rows, adapt=adapt, quantize=quantize, train=train)
    llmtune.train(run, devices=jax.devices()[:1])
    model, merged = (llmtune.load(tmp_path / "run" / own) for own in ("", "export/model"))
    assert isinstance(model.params["head"]["kernel"], Int4) and not merged.config.tie_word_embeddings
    stored = load_file(stories / "model.safetensors")
    own = load_file(tmp_path / "run/export/model/model.safetensors")
    for kind, name in ((NF4, "self_attn.q_proj"), (Int4, "mlp.up_proj")):
        name = f"model.layers.2.{name}.weight"
        matrix = stored[name].T.astype(np.float32)
        codes = np.asarray(kind.declare(ArraySpec(matrix.shape, (None, None))).encode(matrix).dense())
        assert np.linalg.norm(own[name].T - matrix) < 0.9 * np.linalg.norm(codes - matrix), name
    tokens = np.arange(3, 67)[None]
    np.testing.assert_allclose(model.logits(tokens), merged.logits(tokens), atol=1e-3)


def test_a_base_that_loftq_alternated_for_is_exported_with_its_adapter(stories, rows, tmp_path):
    """Both together are the merged model, for llmtune as for peft; and an interrupted run finds the same codes again."""
    adapt = {**ADAPT, "targets": ["q_proj", "up_proj"], "initial": "loftq", "loftq_iterations": 3}
    train = {"steps": 3, "batch_size": 4, "dtype": "float32"}
    sections = {"adapt": adapt, "quantize": {"base": "nf4"}, "train": train, "checkpoint": {"every": 1}}
    run = run_config(tmp_path, stories, rows, **sections)
    train_until(run, step=2)
    llmtune.train(run, devices=jax.devices()[:1])
    export = tmp_path / "run" / "export"
    tokens = np.arange(3, 67)[None]
    merged = llmtune.load(export / "model").logits(tokens)
    np.testing.assert_allclose(llmtune.load(tmp_path / "run").logits(tokens), merged, atol=1e-3)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(export / "base"), export / "adapter").eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), merged, atol=1e-3)
    named = json.loads((export / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(export / "base") and "../base" in (export / "adapter" / "README.md").read_text()
    one, other = (load_file(own / "model.safetensors") for own in (stories, export / "base"))
    name = "model.layers.2.self_attn.{}_proj.weight"
    assert np.abs(one[name.format("q")] - other[name.format("q")]).max() > 0
    whole = run_config(tmp_path, stories, rows, "whole", **sections)
    llmtune.train(whole, devices=jax.devices()[:1])
    uninterrupted = load_file(tmp_path / "whole/export/base/model.safetensors")
    for key, value in other.items():
        np.testing.assert_array_equal(value, uninterrupted[key], err_msg=key)


@pytest.mark.parametrize(
    "into", [pytest.param("dequantized", marks=pytest.mark.nightly), "original"]
)  # and tests/multihost
def test_the_merged_export_says_what_it_was_merged_into_and_what_that_moved(stories, rows, tmp_path, into):
    """The stored base plus the adapter, or the decoded one: tensor by tensor, and the logits that transformers finds."""
    train = {"steps": 4, "batch_size": 4, "dtype": "float32"}
    run = run_config(tmp_path, stories, rows, adapt=ADAPT, quantize={"base": "nf4", "merge_into": into}, train=train)
    llmtune.train(run, devices=jax.devices()[:1])
    said = json.loads((tmp_path / "run/export/model/merge.json").read_text())
    assert said["merged_into"] == into and said["quantized"][0]["base"] == "nf4"
    assert said["base"] == str(stories) and len(said["base_sha256"]) == 64
    assert json.loads((tmp_path / "run/run.json").read_text())["sessions"][-1]["merge"] == said

    name = "model.layers.1.mlp.down_proj.weight"
    factors = load_file(tmp_path / "run/export/adapter/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{own}.weight"] for own in "AB")
    stored = load_file(stories / "model.safetensors")[name].astype(np.float32)
    like = NF4.declare(ArraySpec(stored.T.shape, (None, None))).encode(stored.T)
    base = stored if into == "original" else np.asarray(like.dense()).T
    merged = load_file(tmp_path / "run/export/model/model.safetensors")[name]
    np.testing.assert_allclose(merged, base + 2.0 * b @ a, atol=2e-6)
    trained, exported = (llmtune.load(own) for own in (tmp_path / "run", tmp_path / "run/export/model"))
    tokens = np.arange(3, 67)[None]
    gap = np.abs(trained.logits(tokens) - exported.logits(tokens)).max()  # a run's base is kept as it trained
    assert (gap < 1e-3) == (into == "dequantized"), gap
    moved = said["logits"]
    assert (moved["largest"] < 1e-3) == (into == "dequantized"), moved  # float32 on disk: nothing but rounding
    assert moved["tokens"] > 0 and moved["kl"] >= 0


def refused(directory, model, rows, **sections):
    with pytest.raises(LlmtuneConfigError) as error:
        llmtune.train(run_config(directory, model, rows, **sections), devices=jax.devices()[:1])
    assert not (directory / "run").exists()
    return str(error.value)


def test_what_is_refused(stories, rows, tmp_path):
    def said(**sections):
        return refused(tmp_path, stories, rows, **{"adapt": ADAPT, **sections})

    assert said(quantize={"base": "nf4"}, adapt=None).count("quantize: a quantised base does not train")
    assert said(quantize={"base": "nf5"}).count("quantize.base")
    assert "nearest: q_proj" in said(quantize={"targets": "q_pro"})
    assert "tied to its embedding, which is never quantised" in said(quantize={"targets": "lm_head"})
    assert "looked up" in said(quantize={"targets": ["embed/table"]})
    assert "looked up" in said(quantize={"targets": ["embed_tokens"]})
    assert "quantised, and codes do not train" in said(
        quantize={"base": "int8"}, adapt={"rank": 4, "targets": "mlp", "modules_to_save": ["q_proj"]}
    )
    assert "no target" in said(quantize={"targets": []})
    assert "the list is empty" in said(quantize=[])
    assert 'quantize.1.base: "nf5" is not' in said(quantize=[{"targets": "mlp"}, {"base": "nf5"}])
    assert "quantize.1.targets: layers/0/attention/k/kernel is quantised" in said(
        quantize=[{"targets": "attention"}, {}]
    )
    assert "merge_into differs" in said(
        quantize=[{"targets": "mlp"}, {"targets": "attention", "merge_into": "original"}]
    )
    loftq = {**ADAPT, "initial": "loftq"}
    assert "adapt.initial: loftq makes up for a quantised base" in said(adapt=loftq)
    assert "merge into dequantized" in said(adapt=loftq, quantize={"merge_into": "original"})
    assert "is not quantised; add it to" in said(adapt=loftq, quantize={"targets": "mlp"})
    assert "adapt.loftq_iterations: 0 must be" in said(adapt={**loftq, "loftq_iterations": 0})
    assert "adapt.loftq_iterations: there is nothing to alternate" in said(adapt={**ADAPT, "loftq_iterations": 5})


def test_a_transform_refuses_what_is_quantised_already_and_what_carries_an_adapter(stories):
    from llmtune.models.decoder import declare
    from llmtune.pretrained import open_source
    from llmtune.transforms import chain, lora, quantize

    declared = declare(open_source(str(stories)).config)[1]
    with pytest.raises(LlmtuneConfigError, match="layers/0/attention/k/kernel is quantised already"):
        chain(quantize("nf4"), quantize("int8", targets="attention")).init(declared)
    with pytest.raises(LlmtuneConfigError, match="carries an adapter; quantise first"):
        chain(lora(rank=4, alpha=8), quantize("int8", targets="attention")).init(declared)
    with pytest.raises(LlmtuneConfigError, match="nf5"):
        quantize("nf5")
