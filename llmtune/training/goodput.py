"""Goodput of a supervised run: the share of its time that went into steps which count.

    seconds of the steps in metrics.jsonl  /  seconds since the supervisor began

Steps that were done again after a loss stand in metrics.jsonl once. Starting, reading, compiling, evaluating, saving, exporting
and the time between two starts are in the second figure only.
"""

import json
from pathlib import Path
from typing import Any

from llmtune.evaluation.run_files import read_object, read_rows
from llmtune.training.files import write_whole


def goodput(metrics: Path, after: int, wall_seconds: float, restarts: int) -> dict[str, Any]:
    """`{"training_seconds": 41.2, "wall_seconds": 49.7, "goodput": 0.829, "restarts": 3}`, of the steps after `after`."""
    rows = [row for row in read_rows(metrics) if row["step"] > after]
    training = sum(row.get("seconds") or row["tokens"] / row["tokens_per_second"] for row in rows)
    return {
        "training_seconds": round(training, 3),
        "wall_seconds": round(wall_seconds, 3),
        "goodput": round(training / wall_seconds, 4),
        "restarts": restarts,
    }


def record(facts: Path, found: dict[str, Any]) -> None:
    """Into run.json, beside what the sessions wrote: they have ended."""
    if facts.exists():
        write_whole(facts, json.dumps({**read_object(facts), "supervised": found}, indent=2, ensure_ascii=False) + "\n")
