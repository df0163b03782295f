"""Held-out losses by example: each equal to what numpy in float64 makes of the model's logits for that text alone."""

import json

import jax
import numpy as np
import pytest

import llmtune
from llmtune.tokenizers import load_tokenizer
from tests.evaluation.runs import STARTER, short_run


@pytest.fixture(scope="module")
def expected():
    """(sum of losses, targets) of each of the twenty held-out rows, on an unpacked and unpadded row of its own."""
    model, tokenizer = llmtune.load(STARTER), load_tokenizer(STARTER)
    sums = []
    for line in (STARTER / "instructions_validation.jsonl").read_text().splitlines()[:20]:
        row = json.loads(line)
        prompt = tokenizer.encode(row["prompt"], bos=True)
        ids = [*prompt, *tokenizer.encode(row["completion"], bos=False), tokenizer.eos_ids[0]]
        logits = model.logits(np.array([ids]))[0].astype(np.float64)
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        targets = range(len(prompt), len(ids))
        sums.append((-sum(log_probs[at - 1, ids[at]] for at in targets), len(targets)))
    return np.array(sums).T


@pytest.mark.parametrize("devices", [1, 8])
def test_every_held_out_example_has_its_own_loss(tmp_path, expected, devices):
    run = short_run(tmp_path, overrides=["--train.steps", "1", "--evaluate.prompts", "[]"])
    before = llmtune.train(run, devices=jax.devices()[:devices]).before
    order, wanted = np.argsort(before.losses), np.argsort(expected[0])  # packing puts them in an order of its own
    np.testing.assert_allclose(before.losses[order], expected[0][wanted], rtol=2e-5)
    np.testing.assert_array_equal(before.targets[order], expected[1][wanted])
    assert before.loss == pytest.approx(expected[0].sum() / expected[1].sum(), rel=1e-5)
    assert before.tokens == expected[1].sum()
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())["before"]
    assert (figures["loss"], figures["perplexity"], figures["tokens"]) == (
        before.loss,
        before.perplexity,
        before.tokens,
    )
