"""The figures of a step: FLOPs against torch's own count, what MFU is made of, losses of each source, norms of each part."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import llmtune
from checkpoints_convert.hf_config import parse_model_config
from llmtune.chips import chips
from llmtune.models.decoder import declare
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.training.meter import Meter
from llmtune.training.norms import norms_by_part
from llmtune.training.utilization import PAIRS, Work, attended_pairs, model_work
from tests.evaluation.runs import short_run

DEVICES = np.array([SimpleNamespace(device_kind=chips()["v5e"].kind)] * 4)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_what_torch_counts(tied):
    """torch's counter of a forward and a backward pass; its attention computes all pairs of a row."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.arange(40).reshape(2, 20)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    own = parse_model_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, None, "tiny")
    work = model_work(own, declare(own)[1], DEVICES, adapted=False)
    rotations = 3 * 2 * 2 * 20 * config.head_dim  # torch makes angles by a product, of each row
    counted = counter.get_total_flops()
    assert work.flops(tokens=40, pairs=3 * 2 * 20 * 20) == pytest.approx(counted, abs=rotations)
    assert work.peak == 4 * 197e12


def test_a_frozen_matrix_costs_two_thirds_and_an_adapter_its_own(starter):
    config = llmtune.load(starter).config
    full = model_work(config, declare(config)[1], DEVICES, adapted=False)
    factors = {
        "layers": {"0": {"attention": {"q": {"kernel": {"a": np.zeros((2, 64, 4)), "b": np.zeros((2, 4, 64))}}}}}
    }
    adapter = model_work(config, factors, DEVICES, adapted=True)
    assert adapter.per_token == full.per_token * 2 / 3 + 6 * 2 * (64 * 4 + 4 * 64)


@pytest.mark.parametrize("windows", [(None,), (3, None)])
def test_pairs_are_those_that_a_mask_leaves(windows):
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 2]])
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 0], [0, 1, 0, 1, 2, 3, 4, 5]])
    config = SimpleNamespace(num_hidden_layers=4, window=lambda layer: windows[layer % len(windows)])
    expected = 0
    for layer in range(4):
        window = windows[layer % len(windows)] or 99
        for row in segments:
            expected += sum(row[q] == row[k] > 0 and 0 <= q - k < window for q in range(8) for k in range(8))
    batch = {"segment_ids": jnp.array(segments), "positions": jnp.array(positions)}
    assert float(attended_pairs(config, batch)) == expected


def test_a_row_tells_speed_utilisation_and_what_came_of_the_time():
    work = Work(per_token=1e12, per_pair=1e9, peak=4 * 197e12, devices=4)
    meter = Meter(work, (), lambda step: {"epoch": step / 10}, spent=10.0, began=0.0)
    meter.clock -= 2.0
    metrics = {"loss": 2.5, "tokens": 300.0, "target_tokens": 200.0, "skipped": 1, PAIRS: 1000.0}
    row = meter.row(3, {name: jnp.float32(value) for name, value in metrics.items()})
    flops = 300 * 1e12 + 1000 * 1e9
    assert row["seconds"] == pytest.approx(2.0, rel=0.05) and row["tokens_per_second"] * row[
        "seconds"
    ] == pytest.approx(300)
    assert row["mfu"] * row["seconds"] == pytest.approx(flops / (4 * 197e12))
    assert row["tflops_per_device"] * 4e12 == pytest.approx(row["mfu"] * 4 * 197e12)
    assert row["epoch"] == 0.3 and row["tokens"] == 300 and isinstance(row["tokens"], int) and PAIRS not in row
    assert 0 < row["goodput"] < 1e-6  # twelve seconds since 1970
    assert "mfu" not in Meter(Work(1, 1, None, 1), (), lambda step: {}, 0.0, 0.0).row(1, metrics)


def test_losses_by_source_are_those_of_the_source_alone(starter):
    model = llmtune.load(starter)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (3, 32)).astype(np.int32)
    ids = rng.integers(0, 3, (3, 4)).repeat(8, axis=1).astype(np.int32)  # of every document its source
    batch = {
        "tokens": tokens, "labels": np.where(rng.random((3, 32)) < 0.7, tokens, -100).astype(np.int32),
        "segment_ids": np.tile(np.arange(1, 5, dtype=np.int32).repeat(8), (3, 1)),
        "positions": np.tile(np.arange(8, dtype=np.int32), (3, 4)), "source_ids": ids,
    }  # fmt: skip
    with jax.set_mesh(model.mesh), model.strategy.active():
        loss = functools.partial(next_token_loss, model.bind(model.params))
        total, weight, figures = loss(batch, sources=3)
        assert float(figures["source_losses"].sum()) == pytest.approx(float(total), rel=1e-6)
        assert float(figures["source_targets"].sum()) == float(weight)
        for source in range(3):
            alone, targets, none = loss({**batch, "labels": np.where(ids == source, batch["labels"], -100)})
            assert float(figures["source_losses"][source]) == pytest.approx(float(alone), rel=1e-5)
            assert float(figures["source_targets"][source]) == float(targets) and none == {}


def test_norms_by_part_add_up():
    grads = {
        "embed": {"table": jnp.ones((3, 2))},
        "layers": {
            "0": {"attention_norm": {"weight": jnp.ones(5)}, "attention": {"q": {"kernel": jnp.full((2, 2), 2.0)}}}
        },
        "head": {"kernel": None},
    }
    norms = norms_by_part(grads)
    assert norms == {"grad_norm/attention": 4.0, "grad_norm/embedding": 6**0.5, "grad_norm/norms": 5**0.5}
    assert sum(float(own) ** 2 for own in norms.values()) == pytest.approx(float(optax.tree.norm(grads)) ** 2)
    assert norms_by_part({"layers": {"0": {"mlp": {"up": {"kernel": {"a": jnp.ones(3), "b": jnp.ones(2)}}}}}}) == {}


def test_a_mixture_is_told_apart_in_every_row_of_a_run(tmp_path):
    run = short_run(tmp_path, overrides=["--train.steps", "6", "--evaluate.every", "null", "--evaluate.prompts", "[]"])
    other = tmp_path / "letters.jsonl"
    other.write_text("".join(json.dumps({"prompt": "abc", "completion": f" {n}"}) + "\n" for n in range(30)))
    parts = json.dumps([str(tmp_path / "train.jsonl"), {"path": str(other), "weight": 0.5}])
    run = llmtune.load_run(
        tmp_path / "run.yaml", ["--data.train", parts, "--train.steps", "6", "--evaluate.prompts", "[]"]
    )
    llmtune.train(run, devices=jax.devices()[:2])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        parts = [
            (row[f"loss/{name}"], row[f"target_tokens/{name}"])
            for name in ("train", "letters")
            if f"loss/{name}" in row
        ]
        assert sum(targets for _, targets in parts) == row["target_tokens"]
        assert sum(loss * targets for loss, targets in parts) / row["target_tokens"] == pytest.approx(
            row["loss"], rel=1e-5
        )
        norms = [value for name, value in row.items() if name.startswith("grad_norm/")]
        assert sum(own**2 for own in norms) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["tflops_per_device"] > 0 and row["host_bytes"] > 1e6 and 0 < row["goodput"] <= 1
    assert any("loss/letters" in row for row in rows) and any("loss/train" in row for row in rows)
    assert rows[-1]["epoch"] > rows[0]["epoch"] > 0
