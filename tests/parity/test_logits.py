"""Logits against transformers: 512 positions and more, plain, packed, left-padded and ragged, on one device and on eight."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmtune
from tests.parity.reference import MODELS, load_reference, save_model

TOLERANCE = 1e-4
LENGTH = 600


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    directory = save_model(request.param, tmp_path_factory.mktemp("model") / "hf")
    reference = load_reference(directory)
    return llmtune.load(directory), reference


def tokens_of(model, rows, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, (rows, length))


def reference_logits(reference, tokens, **inputs):
    with torch.no_grad():
        return reference(torch.tensor(np.asarray(tokens)), **inputs).logits.float().numpy()


def test_plain(pair):
    model, reference = pair
    tokens = tokens_of(model, 3)
    np.testing.assert_allclose(model.logits(tokens), reference_logits(reference, tokens), atol=TOLERANCE)


def test_packed_documents_see_only_themselves(pair):
    model, reference = pair
    lengths = (200, 1, 330, 69)
    tokens = tokens_of(model, 3)  # all of one shape, so that each model is compiled once
    segments = np.tile(np.repeat(np.arange(1, 5), lengths), (3, 1))
    logits = model.logits(tokens, segment_ids=segments)[0]
    start = 0
    for length in lengths:
        alone = reference_logits(reference, tokens[:1, start : start + length])[0]
        np.testing.assert_allclose(logits[start : start + length], alone, atol=TOLERANCE)
        start += length


def test_left_padded_and_ragged_rows(pair):
    model, reference = pair
    tokens = tokens_of(model, 3)
    for row, padding in enumerate((0, 77, 590)):
        tokens[row, :padding] = 0
    segments = (np.arange(LENGTH) >= np.array([[0], [77], [590]])).astype(np.int32)
    logits = model.logits(tokens, segment_ids=segments)
    for row, padding in enumerate((0, 77, 590)):
        alone = reference_logits(reference, tokens[row : row + 1, padding:])[0]
        np.testing.assert_allclose(logits[row, padding:], alone, atol=TOLERANCE)


def test_explicit_positions_feed_rope_alone(pair):
    model, reference = pair
    tokens = tokens_of(model, 3)
    positions = np.tile(np.arange(LENGTH) * 2 + 11, (3, 1))
    expected = reference_logits(reference, tokens, position_ids=torch.tensor(positions))
    np.testing.assert_allclose(model.logits(tokens, positions=positions), expected, atol=TOLERANCE)


def test_a_real_model(stories):
    reference = AutoModelForCausalLM.from_pretrained(stories).eval()
    model = llmtune.load(stories)
    tokens = tokens_of(model, 4, 512)
    expected = reference_logits(reference, tokens)
    np.testing.assert_allclose(model.logits(tokens), expected, atol=TOLERANCE)
    for strategy in ("fsdp", "tensor"):
        np.testing.assert_allclose(llmtune.load(stories, strategy=strategy).logits(tokens), expected, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 17, 1500])
def test_lengths_beyond_the_dense_kernel(length, tmp_path):
    directory = save_model("gqa untied", tmp_path / "hf", max_position_embeddings=2048)
    reference = load_reference(directory)
    model = llmtune.load(directory)
    tokens = tokens_of(model, 1, length)
    np.testing.assert_allclose(model.logits(tokens), reference_logits(reference, tokens), atol=TOLERANCE)


def test_both_spellings_of_config_json(tmp_path):
    new = save_model("llama3 scaling beyond the original length", tmp_path / "new")
    old = save_model("llama3 scaling beyond the original length", tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    (old / "config.json").write_text(json.dumps(config))
    one, other = llmtune.load(new), llmtune.load(old)
    assert one.config == other.config and one.config.rope.scaling is not None
    tokens = tokens_of(one, 1)
    np.testing.assert_array_equal(one.logits(tokens), other.logits(tokens))


def test_bfloat16_on_disk_is_read_exactly(tmp_path):
    directory = save_model("gqa untied", tmp_path / "hf", dtype=torch.bfloat16)
    reference = load_reference(directory)
    model = llmtune.load(directory)
    tokens = tokens_of(model, 1)
    np.testing.assert_allclose(model.logits(tokens), reference_logits(reference, tokens), atol=TOLERANCE)
    assert llmtune.load(directory, dtype=None).params["embed"]["table"].dtype == "bfloat16"
