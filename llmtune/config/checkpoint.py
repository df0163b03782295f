"""What a run can be resumed from: the keys under `checkpoint`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key


@dataclass(frozen=True)
class Best:
    """Checkpoints that stay beside the newest ones, because they measured best."""

    metric: str = key("a figure of metrics.jsonl, such as eval_loss or loss", "eval_loss")
    mode: Literal["min", "max"] = key("whether a low figure is good, or a high one", "min")
    n: int = key("how many of them stay", 1)


@dataclass(frozen=True)
class Checkpoint:
    """What a run can be resumed from."""

    every: int = key("steps between checkpoints (one is always written at the end)", 100)
    keep: int = key("newest checkpoints that stay", 3)
    best: Best | None = key("checkpoints that stay besides; absent: none", None)
    retries: int = key(
        "how often in a row a failed save is tried again, each time after one more step, before the run stops", 1
    )


def check_checkpoint(
    checkpoint: Checkpoint, evaluate_every: int | None, validates: bool, require: Callable[[bool, str, str], None]
) -> None:
    """Raises LlmtuneConfigError naming the key; `validates`: whether there is validation data."""
    for name in ("every", "keep"):
        value = getattr(checkpoint, name)
        require(value > 0, f"checkpoint.{name}", f"{value} must be positive")
    require(checkpoint.retries >= 0, "checkpoint.retries", f"{checkpoint.retries} must be 0 or more")
    best = checkpoint.best
    if best is None:
        return
    require(best.n > 0, "checkpoint.best.n", f"{best.n} must be positive")
    if best.metric.startswith("eval_"):
        require(
            validates and evaluate_every is not None,
            "checkpoint.best.metric",
            f"{best.metric} is not measured during training; set data.validation and evaluate.every, or take loss",
        )
        require(
            checkpoint.every % (evaluate_every or math.inf) == 0,
            "checkpoint.every",
            f"{checkpoint.every} is no multiple of evaluate.every {evaluate_every}, so that checkpoints have no {best.metric}",
        )
