"""Greedy generation against transformers: 128 tokens of 8 ragged prompts, on one device and on eight."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune
from tests.parity.reference import MODELS, save_model

PROMPTS = (
    "Once upon a time", "Lily and Tom went to the park", "The", "One day, a big dog", "Tim had a red ball. He", "Mom said",
    "There was a little bird who lived in a tall tree and liked to sing", "A cat",
)  # fmt: skip


def reference_completions(directory, prompts, count, eos):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    completions = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0,
            )  # fmt: skip
        completion = out[0, len(prompt) :].tolist()
        completions.append(completion[:-1] if completion and completion[-1] in (eos or []) else completion)
    return completions


@pytest.mark.parametrize("strategy", [None, "fsdp", "tensor"])
def test_a_real_model_continues_as_in_transformers(stories, strategy):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    model = llmtune.load(stories, strategy=strategy)
    expected = reference_completions(stories, prompts, 128, [1, 2])
    assert model.generate(prompts, max_new_tokens=128) == expected
    texts = model.generate(list(PROMPTS), max_new_tokens=128)
    whole = [tokenizer.decode([*p, *c], skip_special_tokens=True) for p, c in zip(prompts, expected, strict=True)]
    assert [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)] == whole


OFTEN = ("gqa untied", "llama3 scaling beyond the original length", "mistral")


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.nightly) for n in MODELS])
def test_random_models_and_rows_of_one_token(name, tmp_path):
    directory = save_model(name, tmp_path / "hf")
    prompts = [np.random.default_rng(n).integers(3, 199, n).tolist() for n in (1, 2, 3, 17, 40, 64, 130, 200)]
    expected = reference_completions(directory, prompts, 128, [2])
    assert llmtune.load(directory).generate(prompts, max_new_tokens=128) == expected


def test_the_end_of_a_completion(stories):
    model = llmtune.load(stories)
    [free] = model.generate(["Once upon a time"], max_new_tokens=60)
    assert "." in free
    [stopped] = model.generate(["Once upon a time"], max_new_tokens=60, stop=["."])
    assert stopped == free.split(".")[0]
    ids = model.tokenizer.encode("Once upon a time")
    [cut] = model.generate([ids], max_new_tokens=60, stop=".")
    [all_ids] = model.generate([ids], max_new_tokens=60)
    assert cut == all_ids[: len(cut)] and 0 < len(cut) < len(all_ids)
    assert [len(c) for c in model.generate([ids], max_new_tokens=7)] == [7]


def test_sampling_is_seeded_and_rows_do_not_depend_on_their_neighbours(stories):
    model = llmtune.load(stories)
    settings = {"max_new_tokens": 20, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    one = model.generate(list(PROMPTS), seed=1, **settings)
    assert one == model.generate(list(PROMPTS), seed=1, **settings)
    assert one != model.generate(list(PROMPTS), seed=2, **settings)
    assert one[:1] == model.generate(list(PROMPTS[:1]), seed=1, **settings)
    greedy = model.generate(list(PROMPTS), max_new_tokens=20)
    assert greedy == model.generate(list(PROMPTS), max_new_tokens=20, temperature=1.0, top_k=1)


def test_a_second_call_of_the_same_shape_compiles_nothing(stories):
    import jax

    model = llmtune.load(stories)
    model.generate(list(PROMPTS), max_new_tokens=10)
    with jax.log_compiles(False), jax.check_tracer_leaks(False):
        from llmtune.generation import engine

        before = engine._compiled.cache_info().misses
        model.generate(list(PROMPTS[::-1]), max_new_tokens=12)
        assert engine._compiled.cache_info().misses == before
