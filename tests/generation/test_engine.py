"""The decoding loop: rows that end at different times, lengths across a slice, neighbours, few compilations, bad prompts."""

import numpy as np
import pytest

import llmtune
from llmtune.errors import LlmtuneConfigError
from llmtune.generation.engine import SLICE, _compiled
from tests.parity.reference import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llmtune.load(save_model("gqa untied", tmp_path_factory.mktemp("engine") / "hf"))


def prompts(*lengths):
    return [np.random.default_rng(length).integers(3, 199, length).tolist() for length in lengths]


def test_decoding_equals_the_forward_pass_at_every_step(model):
    """The cache changes nothing: each token is the argmax of the whole row's logits before it."""
    for prompt, completion in zip(
        prompts(1, 17, 90), model.generate(prompts(1, 17, 90), max_new_tokens=40), strict=True
    ):
        row = np.array([prompt + completion])
        best = model.logits(row)[0].argmax(-1)
        assert best[len(prompt) - 1 : -1].tolist() == completion
        if len(completion) < 40:
            assert best[-1] in model.config.eos_token_ids


@pytest.mark.parametrize("count", [1, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE])
def test_a_longer_request_continues_a_shorter_one(model, count):
    longest = model.generate(prompts(9), max_new_tokens=3 * SLICE)[0]
    assert model.generate(prompts(9), max_new_tokens=count)[0] == longest[:count]


def test_rows_do_not_depend_on_their_neighbours(model):
    together = model.generate(prompts(3, 100, 31, 1, 64), max_new_tokens=24)
    alone = [model.generate(prompts(length), max_new_tokens=24)[0] for length in (3, 100, 31, 1, 64)]
    assert together == alone


def test_nearby_lengths_share_one_compilation(model):
    model.generate(prompts(20, 30), max_new_tokens=5)
    before = _compiled.cache_info().misses
    model.generate(prompts(17, 32), max_new_tokens=SLICE)
    assert _compiled.cache_info().misses == before


def test_a_row_that_has_ended_stays_ended(model):
    """Rows end at their own eos, while others go on."""
    free = model.generate(prompts(5, 40), max_new_tokens=40)
    eos = free[0][3]
    engine_eos = llmtune.Model(**{**vars(model), "config": _with_eos(model.config, (eos,))})
    ended = engine_eos.generate(prompts(5, 40), max_new_tokens=40)
    assert ended == [row[: row.index(eos)] if eos in row else row for row in free]
    assert len(ended[0]) <= 3


def _with_eos(config, ids):
    return type(config)(**{**vars(config), "eos_token_ids": ids})


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([], {}, "empty"), ([[]], {}, "no tokens"), ([[5], []], {}, "prompt 1"), ([[5, 9999]], {}, "token ids"),
        ([[-1]], {}, "token ids"), ([[5]], {"max_new_tokens": 0}, "max_new_tokens"), (["text"], {}, "no tokenizer"),
        ("text", {}, "list of prompts"), ([[5]], {"stop": "."}, "no tokenizer"), (["a", [5]], {}, "not both"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused(model, given, settings, message):
    with pytest.raises(LlmtuneConfigError, match=message):
        model.generate(given, **{"max_new_tokens": 4, **settings})
