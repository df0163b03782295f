"""The token loss against torch's cross-entropy in float64: masked labels, packed documents, rows of padding."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from llmtune.objectives.language_modeling import next_token_loss, shifted_targets

VOCAB = 50


@dataclass
class FixedLogits:
    """A model whose logits are given."""

    values: Any

    def token_log_probs(self, tokens, positions, segment_ids, targets, key=None):
        logits = self.values - np.log(np.exp(self.values).sum(-1, keepdims=True))
        return np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0], None, {}


def batch_of(documents, length):
    """One row of packed (tokens, labels) documents, and padding."""
    row = {name: np.zeros((1, length), np.int32) for name in ("tokens", "labels", "segment_ids", "positions")}
    at = 0
    for number, (tokens, labels) in enumerate(documents, 1):
        span = slice(at, at + len(tokens))
        row["tokens"][0, span], row["labels"][0, span] = tokens, labels
        row["segment_ids"][0, span], row["positions"][0, span] = number, np.arange(len(tokens))
        at += len(tokens)
    return row  # labels of padding are 0 here, a real token id: only segment ids tell


def test_packed_documents_against_torch():
    rng = np.random.default_rng(0)
    documents = []
    for length in (7, 1, 12, 5):
        tokens = rng.integers(0, VOCAB, length)
        documents.append((tokens, np.where(rng.random(length) < 0.4, -100, tokens)))
    batch, logits = batch_of(documents, 32), rng.standard_normal((1, 32, VOCAB))
    loss, weight, _ = next_token_loss(FixedLogits(logits), {k: jnp.asarray(v) for k, v in batch.items()})
    expected, count, at = 0.0, 0, 0
    for tokens, labels in documents:  # each document by itself: nothing is predicted across a boundary
        own = torch.tensor(logits[0, at : at + len(tokens)][:-1])
        targets = torch.tensor(labels[1:])
        expected += torch.nn.functional.cross_entropy(own, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
        at += len(tokens)
    assert weight == count
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_row_of_padding_weighs_nothing():
    zeros = jnp.zeros((2, 8), jnp.int32)
    targets, weights = shifted_targets(zeros, zeros)
    assert not np.any(weights) and not np.any(targets)


def test_the_last_token_of_a_row_has_no_target():
    labels, ones = jnp.arange(1, 5)[None], jnp.ones((1, 4), jnp.int32)
    targets, weights = shifted_targets(labels, ones)
    assert targets.tolist() == [[2, 3, 4, 0]] and weights.tolist() == [[1, 1, 1, 0]]
