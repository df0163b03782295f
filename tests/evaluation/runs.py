"""Short runs of the starter model, with validation data and prompts: what the report is made of."""

import json

import llmtune
from tests.conftest import ROOT

STARTER = ROOT / "llmtune" / "starter"
HOSTILE = "</script></style><img src=x onerror=alert(1)>"
PROMPTS = ["List the animals: Karl the badger met Lotte the goose at the bridge.\nAnswer:", HOSTILE]


def short_run(directory, name="run", overrides=(), rows=60, held_out=20):
    """The configuration of a run of twelve steps, read from a file as a user's would be; `overrides` as on a command line."""
    for part, wanted in (("train", rows), ("validation", held_out)):
        lines = (STARTER / f"instructions_{part}.jsonl").read_text().splitlines(keepends=True)
        (directory / f"{part}.jsonl").write_text("".join(lines[:wanted]))
    tree = {
        "model": "llmtune:starter",
        "output": str(directory / name),
        "data": {
            "train": str(directory / "train.jsonl"), "validation": str(directory / "validation.jsonl"),
            "format": "prompt_completion", "sequence_length": 128,
        },
        "adapt": {"rank": 4, "alpha": 8},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {"steps": 12, "batch_size": 4, "dtype": "float32", "remat": "none"},
        "evaluate": {"every": 4, "prompts": PROMPTS, "max_new_tokens": 6},
        "checkpoint": {"every": 4},
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(tree))
    return llmtune.load_run(path, list(overrides))
