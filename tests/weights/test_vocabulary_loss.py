"""A vocabulary in pieces that are filled up to whole registers: no column counts twice, and none that only fills up."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmtune.sharding import load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.weights import vocabulary_loss as module
from llmtune.weights.vocabulary_loss import number_of_pieces, size_of_pieces, vocabulary_loss

BATCH, SEQ, HIDDEN, VOCAB = 8, 6, 16, 1003
STRATEGY = load_strategy("fsdp", configs_directory() / "strategies")


@pytest.mark.parametrize("layout", ["io", "oi"])
def test_results_and_gradients_in_float64(monkeypatch, layout):
    monkeypatch.setattr(module, "LOGITS", 4 * SEQ * 300)  # room for 300 columns: 4 pieces of 256
    rng, mesh = np.random.default_rng(0), make_mesh({"fsdp": 8})
    hidden, w = rng.standard_normal((BATCH, SEQ, HIDDEN)), rng.standard_normal((HIDDEN, VOCAB))
    targets = rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32)
    targets[0] = VOCAB - 1

    def loss(hidden, w):
        with STRATEGY.active():
            found = vocabulary_loss(hidden, w, targets, chunk=SEQ, layout=layout)
        return found[0].sum(), found

    def place(array, *axes):
        return jax.device_put(array.astype(np.float32), NamedSharding(mesh, STRATEGY.spec(*axes)))

    with jax.set_mesh(mesh):
        placed = place(hidden, "batch", "seq", None), place(w if layout == "io" else w.T, *_axes(layout))
        targets_placed = jax.device_put(targets, NamedSharding(mesh, STRATEGY.spec("batch", "seq")))
        targets, kept = targets_placed, targets
        (_, (log_probs, totals)), (dh, dw) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*placed)
    logits = hidden @ w
    expected = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(totals, expected, atol=1e-5)
    np.testing.assert_allclose(log_probs, np.take_along_axis(logits, kept[..., None], -1)[..., 0] - expected, atol=1e-5)
    change = np.eye(VOCAB)[kept] - np.exp(logits - expected[..., None])
    np.testing.assert_allclose(dh, change @ w.T, atol=1e-4)
    dw = np.asarray(dw) if layout == "io" else np.asarray(dw).T
    np.testing.assert_allclose(dw, np.einsum("bsh,bsv->hv", hidden, change), atol=1e-4)


def _axes(layout):
    return ("embed", "vocab") if layout == "io" else ("vocab", "embed")


def test_pieces_are_whole_registers():
    for width in (128256, 32000, 131072, 1003, 160):
        for most in (64, 2730, 8192, width):
            pieces = number_of_pieces(width, most)
            size = size_of_pieces(width, pieces)
            assert pieces * size >= width and (size % 128 == 0 or size < 128)
