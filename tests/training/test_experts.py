"""Runs that adapt the experts of a mixture: resumed to the bit, exported, taken up again from what was exported."""

import jax
import numpy as np
import pytest

import llmtune
from tests.parity.reference import save_model
from tests.runs import read_curve, run_config, write_rows
from tests.training.interruption import StoppingDisplay, train_until

METHODS = {
    "dora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "experts"]},
    "vera": {"rank": 8, "targets": "layers"},
    "ia3": {"targets": ["k_proj", "experts"], "feedforward": "experts/down"},
    "pfeiffer": {"size": 4},
}
NOTES = {
    "dora": "DoRA on experts: this directory (LLMTUNE_DORA)",
    "vera": "VeRA on experts: this directory (LLMTUNE_VERA)",
    "ia3": "IA3 on experts: this directory (LLMTUNE_IA3)",
    "pfeiffer": "bottlenecks behind a projection: this directory (LLMTUNE_SEQUENTIAL)",
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """(a small Mixtral, rows)."""
    directory, tokens = tmp_path_factory.mktemp("mixtral"), np.random.default_rng(0).integers(3, 199, (6, 4, 32))
    model = save_model("mixtral", directory / "model", num_local_experts=4, num_hidden_layers=2)
    return model, write_rows(directory / "rows.jsonl", tokens, tokens)


@pytest.mark.parametrize(
    ("method", "base"),
    [("dora", "nf4"), *(pytest.param(own, None, marks=pytest.mark.nightly) for own in METHODS)],
)
def test_a_run_on_experts_resumes_and_is_taken_up_again(ground, tmp_path, method, base):
    model, rows = ground
    sections = {
        "adapt": {"method": method, **METHODS[method]}, "quantize": base and {"base": base},
        "train": {"steps": 3, "batch_size": 4, "dtype": "float32"}, "checkpoint": {"every": 1},
    }  # fmt: skip
    whole, cut = (run_config(tmp_path, model, rows, name, **sections) for name in ("whole", "cut"))
    display = StoppingDisplay()
    llmtune.train(whole, display, devices=jax.devices()[:1])
    train_until(cut, 2)
    llmtune.train(cut, devices=jax.devices()[:1])
    np.testing.assert_array_equal(read_curve(cut.output)[0], read_curve(whole.output)[0])
    assert f"peft has no form for {NOTES[method]}" in display.text

    tokens = np.random.default_rng(1).integers(3, 199, (2, 24))
    loaded, export = llmtune.load(whole.output), tmp_path / "whole" / "export"
    assert np.abs(loaded.logits(tokens) - llmtune.load(model).logits(tokens)).max() > 1e-3
    if method == "pfeiffer":
        assert not (export / "model").exists()
    else:
        np.testing.assert_allclose(loaded.logits(tokens), llmtune.load(export / "model").logits(tokens), atol=1e-4)

    on = {**sections, "adapt": {"method": method, "from": str(export / "adapter")}}
    further = run_config(tmp_path, model, rows, "further", **on)
    llmtune.train(further, devices=jax.devices()[:1])
    assert read_curve(further.output)[0][0] < read_curve(whole.output)[0][0]
