"""A bank of adapters: each row as if its own adapter alone were served, whatever stands beside it."""

import shutil

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import llmtune
from llmtune.errors import LlmtuneError
from llmtune.model import _logits, read
from llmtune.origin import base_of
from llmtune.transforms import quantize
from llmtune.weights import has_codes
from tests.parity.reference import save_model

TOKENS = np.random.default_rng(0).integers(3, 199, (5, 40))
SETTINGS = {
    "wide": {"r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "narrow": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "uneven": {"r": 4, "target_modules": ["v_proj"], "rank_pattern": {"layers.1.self_attn.v_proj": 2}},
}
CHOSEN = ["narrow", "wide", None, "uneven", "wide"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model("gqa untied", tmp_path_factory.mktemp("base") / "hf", hidden_size=64, num_attention_heads=8)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory / name)
    return {name: directory / name for name in SETTINGS}


@pytest.fixture(scope="module")
def alone(base, adapters):
    """The model of each adapter by itself, and the base."""
    return {None: llmtune.load(base), **{n: llmtune.load(base, adapters=[p]) for n, p in adapters.items()}}


@pytest.mark.parametrize("strategy", [None, pytest.param("fsdp", marks=pytest.mark.nightly)])
def test_each_row_is_served_as_if_alone(base, adapters, alone, strategy):
    bank = llmtune.load_bank(base, adapters, strategy=strategy)
    expected = np.stack([alone[name].logits(TOKENS[k : k + 1])[0] for k, name in enumerate(CHOSEN)])
    assert np.abs(expected - alone[None].logits(TOKENS)).max() > 1
    np.testing.assert_allclose(bank.rows(CHOSEN).logits(TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kept", ["int8", pytest.param("nf4", marks=pytest.mark.nightly)])
def test_over_a_quantised_base_and_of_runs(base, adapters, tmp_path, kept):
    """The codes are read once for all rows; a run is named by its directory."""
    run = tmp_path / "run"
    shutil.copytree(adapters["wide"], run / "export" / "adapter")
    bank = llmtune.load_bank(base, {"wide": run, "narrow": adapters["narrow"]}, quantize=kept)
    chosen = ["narrow", "wide", None]
    given = {None: [], "wide": [adapters["wide"]], "narrow": [adapters["narrow"]]}
    alone = {
        name: read(base_of(base, quantize(kept)), adapters=own, dtype="float32", strategy=None)
        for name, own in given.items()
    }
    expected = np.stack([alone[name].logits(TOKENS[k : k + 1])[0] for k, name in enumerate(chosen)])
    np.testing.assert_allclose(bank.rows(chosen).logits(TOKENS[:3]), expected, atol=1e-4, rtol=0)
    assert has_codes(bank.model.params)


def test_another_choice_compiles_nothing_anew(base, adapters):
    bank = llmtune.load_bank(base, list(adapters.values()))
    assert bank.names == tuple(map(str, adapters.values()))
    first = bank.rows([bank.names[0]] * 5)
    first.logits(TOKENS)
    compiled = _logits(first.bind, first.strategy)._cache_size()
    bank.rows([bank.names[1], None, None, bank.names[2], None]).logits(TOKENS)
    assert _logits(first.bind, first.strategy)._cache_size() == compiled


def test_generation_with_a_cache(base, adapters, alone):
    prompts = [row[: 4 + 3 * k].tolist() for k, row in enumerate(TOKENS)]
    together = llmtune.load_bank(base, adapters).rows(CHOSEN).generate(prompts, max_new_tokens=12)
    served = alone["wide"].generate(prompts, max_new_tokens=12)
    assert [together[k] for k in (1, 4)] == [served[k] for k in (1, 4)] and together[0] != served[0]


def test_what_a_bank_refuses(base, adapters, tmp_path):
    bank = llmtune.load_bank(base, adapters)
    with pytest.raises(LlmtuneError, match=r"no adapter is chosen; say which with `bank.rows"):
        bank.model.logits(TOKENS)
    with pytest.raises(LlmtuneError, match="chosen for 2 rows, and 5 rows are given"):
        bank.rows([None, "wide"]).logits(TOKENS)
    with pytest.raises(LlmtuneError, match="no adapter 'wise'; there are wide, narrow, uneven"):
        bank.rows(["wise"])
    with pytest.raises(LlmtuneError, match="holds Bank, which no matrix can stand for"):
        bank.rows(CHOSEN).save(tmp_path / "out")
    ends = LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), ends).save_pretrained(
        tmp_path / "ends", save_embedding_layers=False
    )
    with pytest.raises(LlmtuneError, match="an adapter is on embed/table; rows choose among those of no embedding"):
        llmtune.load_bank(base, [tmp_path / "ends"])
    other = save_model("gqa untied", tmp_path / "other", hidden_size=48)
    with pytest.raises(LlmtuneError, match="made for another base model"):
        llmtune.load_bank(other, adapters)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "whole")
    with pytest.raises(LlmtuneError, match="weights in whole; a bank is of LoRA adapters alone"):
        llmtune.load_bank(base, [tmp_path / "whole"])


def test_nothing_of_a_bank_trains(base, adapters):
    from llmtune.transforms import adapters as rule
    from llmtune.transforms import partition

    trainable, _ = partition(llmtune.load_bank(base, adapters).model.params, rule)
    assert not jax.tree.leaves(trainable)
