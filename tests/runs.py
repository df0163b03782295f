"""Small runs for tests: fixed batches of real text, a configuration, and the curve that training leaves."""

import json

import jax
import numpy as np
import pytest

import llmtune

STEPS = 20
OPTIMIZER = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "clip_norm": 1.0}
ADAPT = {"full": None, "lora": {"rank": 4, "alpha": 8}}
LORA_BY_DAY, FULL_BY_DAY = (  # both kinds of training, one of them by night only
    [pytest.param(own, id=kind, marks=[] if kind == day else [pytest.mark.nightly]) for kind, own in ADAPT.items()]
    for day in ("lora", "full")
)


def fixed_batches(assets):
    """(tokens, labels), int [20, 4, 64]: real text, with a different number of masked targets in every row."""
    tokens = np.load(assets / "derived" / "gsm8k_batches.npz")["full_and_lora_train"]
    labels = tokens.copy()
    for step in range(STEPS):
        for row in range(4):
            labels[step, row, : (7 * step + 13 * row) % 50] = -100
    return tokens, labels


def write_rows(path, tokens, labels):
    """The batches as `format: tokens`, a row per line."""
    rows = zip(
        tokens.reshape(-1, tokens.shape[-1]).tolist(), labels.reshape(-1, labels.shape[-1]).tolist(), strict=True
    )
    path.write_text("".join(json.dumps({"input_ids": i, "labels": ls}) + "\n" for i, ls in rows))
    return path


def run_config(directory, model, rows, name="run", **sections):
    """A run on such rows, its configuration read from a file as a user's would be; `sections` replace whole sections."""
    tree = {
        "model": str(model),
        "output": str(directory / name),
        "objective": "sft",
        "data": {"train": str(rows), "format": "tokens", "sequence_length": 64, "packing": False, "shuffle": False},
        "optimizer": OPTIMIZER,
        "train": {"steps": STEPS, "batch_size": 4, "dtype": "float32"},
        **{section: own for section, own in sections.items() if own is not None},
    }
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return llmtune.load_run(path)


def curve(run, devices=1, display=None):
    """(losses, gradient norms) of the whole run, trained on so many devices."""
    llmtune.train(run, display, devices=jax.devices()[:devices])
    return read_curve(run.output)


def read_curve(directory):
    """(losses, gradient norms) as metrics.jsonl holds them."""
    with open(f"{directory}/metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return np.array([row["loss"] for row in rows]), np.array([row["grad_norm"] for row in rows])
