"""`llmtune export` on adapters that peft wrote: what vLLM takes, ranks, arithmetic; a mistake is one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.cli import main
from tests.parity.reference import save_model

TOKENS = np.random.default_rng(0).integers(3, 199, (2, 20))
SETTINGS = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model("gqa untied", tmp_path_factory.mktemp("base") / "hf", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    directory, made = tmp_path_factory.mktemp("adapters"), {}
    kinds = {
        "plain": {"target_modules": ["q_proj", "up_proj"]},
        "patterns": {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {"up_proj": 3},
        },
        "dora": {"target_modules": ["q_proj"], "use_dora": True},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "wide": {"target_modules": ["q_proj"], "r": 20},
    }
    for name, own in kinds.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_pretrained(base)
        get_peft_model(model, LoraConfig(**{**SETTINGS, **own})).save_pretrained(directory / name)
        made[name] = directory / name
    return made


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("plain", 0, ["vLLM loads it"]),
        ("wide", 0, ["vLLM loads it", "rank 20 is more than", "--max-lora-rank 32"]),
        ("patterns", 1, ["will not serve", "rank_pattern or alpha_pattern", "--pad-rank 8"]),
        ("dora", 1, ["use_dora is true"]),
        ("saved", 1, ["modules_to_save is ['lm_head']"]),
    ],
)
def test_it_says_what_vllm_takes(adapters, capsys, name, code, said):
    assert main(["export", str(adapters[name]), "--check", "vllm"]) == code
    printed = capsys.readouterr().out
    assert all(part in printed for part in said)


def test_a_padded_adapter_is_the_same_and_is_taken(base, adapters, tmp_path, capsys):
    out = tmp_path / "padded"
    assert (
        main(["export", str(adapters["patterns"]), "--pad-rank", "8", "--output", str(out), "--model", str(base)]) == 0
    )
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["r"] == 8 and not settings["rank_pattern"] and not settings["alpha_pattern"]
    assert main(["export", str(out), "--check", "vllm"]) == 0
    one, other = (llmtune.load(base, adapters=[path]).logits(TOKENS) for path in (adapters["patterns"], out))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_compressed_adapter_says_how_much_moved(base, adapters, tmp_path, capsys):
    out = tmp_path / "narrow"
    main(["export", str(adapters["wide"]), "--compress-rank", "16", "--output", str(out), "--model", str(base)])
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 16
    moved = float(capsys.readouterr().out.split("moved by ")[1].split("%")[0])
    assert 0 < moved < 60


def test_two_adapters_become_one(base, adapters, tmp_path):
    out, paths = tmp_path / "sum", [str(adapters["plain"]), str(adapters["wide"])]
    main(["export", *paths, "--combine", "cat", "--weights", "1,1", "--output", str(out), "--model", str(base)])
    one, other = (llmtune.load(base, adapters=own).logits(TOKENS) for own in (paths, [out]))
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plain"], "give one of --check"),
        (["plain", "--pad-rank", "8"], "--output is missing"),
        (["plain", "--pad-rank", "2", "--output", "out"], "--pad-rank: 2 is less than 4"),
        (["plain", "--pad-rank", "8", "--output", "out", "--model", "nowhere"], "neither a directory nor a preset"),
        (["dora", "--pad-rank", "8", "--output", "out"], "DoRA is not linear"),
        (["saved", "--pad-rank", "8", "--output", "out"], "in whole"),
        (["plain", "wide", "--combine", "linear", "--output", "out"], "differ in rank"),
        (["plain", "wide", "--combine", "cat", "--weights", "1;2", "--output", "out"], "is not a list of numbers"),
        (["plain", "wide", "--pad-rank", "8", "--output", "out"], "one adapter at a time"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(base, adapters, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    named = [str(adapters.get(own, own)) for own in arguments]
    if "--model" not in named and "--output" in named:
        named += ["--model", str(base)]
    assert main(["export", *named]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_merged_model_is_not_quantised(tmp_path, capsys):
    (tmp_path / "run" / "export" / "adapter").mkdir(parents=True)
    assert main(["export", str(tmp_path / "run"), "--quantize", "int8", "--output", str(tmp_path / "out")]) == 2
    assert "has no model, since its adapter cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("IA3", "serve the merged model"),
        ("PREFIX_TUNING", "cannot be merged either"),
        ("LOHA", "llmtune does not read it"),
    ],
)
def test_another_method_is_named_and_what_to_do_about_it(adapters, tmp_path, capsys, method, said):
    shutil.copytree(adapters["plain"], tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
    assert main(["export", str(tmp_path / "other"), "--check", "vllm"]) == 1
    printed = capsys.readouterr().out
    assert f"peft_type is {method}" in printed and said in printed
