"""Greedy generation against transformers: 128 tokens of 8 ragged prompts, on one device and on eight."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import llmtune
from tests.parity.reference import MODELS, load_reference, save_model

PROMPTS = (
    "Once upon a time", "Lily and Tom went to the park", "The", "One day, a big dog", "Tim had a red ball. He", "Mom said",
    "There was a little bird who lived in a tall tree and liked to sing", "A cat",
)  # fmt: skip


def reference_completions(directory, prompts, count, eos):
    model = load_reference(directory)
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


def continues_as_in_transformers(stories, strategy, count):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    model = llmtune.load(stories, strategy=strategy)
    expected = reference_completions(stories, prompts, count, [1, 2])
    assert model.generate(prompts, max_new_tokens=count) == expected
    return tokenizer, model, prompts, expected


def test_a_real_model_continues_as_in_transformers(stories):
    tokenizer, model, prompts, expected = continues_as_in_transformers(stories, None, 128)
    texts = model.generate(list(PROMPTS), max_new_tokens=128)
    whole = [tokenizer.decode([*p, *c], skip_special_tokens=True) for p, c in zip(prompts, expected, strict=True)]
    assert [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)] == whole


@pytest.mark.parametrize(
    ("strategy", "count"),
    [("fsdp", 12), *(pytest.param(s, 128, marks=pytest.mark.nightly) for s in ("fsdp", "tensor"))],
)
def test_a_real_model_continues_on_eight_devices(stories, strategy, count):
    continues_as_in_transformers(stories, strategy, count)


OFTEN = "llama3 scaling beyond the original length"


@pytest.mark.parametrize("name", [n if n == OFTEN else pytest.param(n, marks=pytest.mark.nightly) for n in MODELS])
def test_random_models_and_rows_of_one_token(name, tmp_path):
    directory = save_model(name, tmp_path / "hf")
    prompts = [np.random.default_rng(n).integers(3, 199, n).tolist() for n in (1, 2, 3, 17, 40, 64, 130, 200)]
    expected = reference_completions(directory, prompts, 128, [2])
    assert llmtune.load(directory).generate(prompts, max_new_tokens=128) == expected


CACHED = {  # a window of 24 does not divide the length that prompts are padded to: the ring begins within
    "mistral with a window": {"sliding_window": 24},
    "ministral, interleaved windows": {},
    "ministral 3": {},
    "mixtral": {},
}


@pytest.mark.parametrize("name", list(CACHED))
def test_continuations_across_the_edge_of_the_window(name, tmp_path):
    """Prompts within, at the edge of and beyond their window, left-padded beside each other, continued beyond."""
    continues_alike(name, tmp_path / "hf", count=24, **CACHED[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(CACHED))
def test_long_continuations_across_the_edge_of_the_window(name, tmp_path):
    continues_alike(name, tmp_path / "hf", **CACHED[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in MODELS if name not in CACHED])
def test_continuations_of_every_other_model(name, tmp_path):
    continues_alike(name, tmp_path / "hf")


def continues_alike(name, directory, strategy=None, count=48, **more):
    save_model(name, directory, **more)
    prompts = [np.random.default_rng(n).integers(3, 199, n).tolist() for n in (3, 31, 70)]
    model = llmtune.load(directory, strategy=strategy)
    assert model.generate(prompts, max_new_tokens=count) == reference_completions(directory, prompts, count, [2])
    return model


@pytest.mark.parametrize(("name", "strategy"), [("mixtral", "expert"), ("ministral, interleaved windows", "tensor")])
def test_continuations_of_a_sharded_model(name, strategy, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 200, "head_dim": 16}
    assert continues_alike(name, tmp_path / "hf", strategy, count=8, **sizes).mesh.size == 8


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
