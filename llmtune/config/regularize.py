"""Against overfitting and forgetting: the keys under `regularize`, `average` and `early_stopping`."""

import math
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key
from llmtune.config.optimizers import Require


@dataclass(frozen=True)
class Regularize:
    """What is added to the loss, or to what the model reads, while it trains."""

    attention_dropout: float | None = key(
        "share of attention's weights that each step leaves out; null: the model's own, from its config.json", None
    )
    neftune: float | None = key("size of the uniform noise on embeddings (NEFTune's alpha, about 5); null: none", None)
    label_smoothing: float = key("share of a target's weight that is spread over the whole vocabulary", 0.0)
    z_loss: float = key("times the squared log-sum-exp of the logits; 1e-4 keeps them from drifting", 0.0)
    l2_start: float = key("times half the squared distance from the weights at the start (L2-SP)", 0.0)
    kl_start: float = key("times the divergence of the model's next-token distribution from that at the start", 0.0)


@dataclass(frozen=True)
class Average:
    """An exponential moving average of the weights that train, kept beside them."""

    decay: float = key("of the average in each step; lower in the first steps", 0.999)
    evaluate: bool = key("held-out loss and samples are the average's", True)
    export: bool = key("the average is exported", True)


@dataclass(frozen=True)
class EarlyStopping:
    """The run ends where a figure no longer gets better."""

    metric: str = key("any figure of metrics.jsonl", "eval_loss")
    mode: Literal["min", "max"] = key("which way is better", "min")
    patience: int = key("so many measurements without a better one end the run", 3)
    min_delta: float = key("by how much a measurement must be better to count", 0.0)


def check_regularize(
    regularize: Regularize, average: Average | None, stopping: EarlyStopping | None, require: Require
) -> None:
    """Raises LlmtuneConfigError naming the key."""
    for name in ("z_loss", "l2_start", "kl_start"):
        value = getattr(regularize, name)
        require(0 <= value < math.inf, f"regularize.{name}", f"{value} must be 0 or more")
    dropout = regularize.attention_dropout
    require(dropout is None or 0 <= dropout < 1, "regularize.attention_dropout", f"{dropout} must lie in [0, 1)")
    smoothing, noise = regularize.label_smoothing, regularize.neftune
    require(0 <= smoothing < 1, "regularize.label_smoothing", f"{smoothing} must lie in [0, 1)")
    require(noise is None or 0 < noise < math.inf, "regularize.neftune", f"{noise} must be positive, or null for none")
    if average is not None:
        require(0 < average.decay < 1, "average.decay", f"{average.decay} must lie in (0, 1)")
    if stopping is not None:
        require(stopping.patience > 0, "early_stopping.patience", f"{stopping.patience} must be positive")
        delta = stopping.min_delta
        require(0 <= delta < math.inf, "early_stopping.min_delta", f"{delta} must be 0 or more")
