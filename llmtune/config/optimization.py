"""How gradients become updates, and how much is computed at a time: the keys under `optimizer` and `train`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key


@dataclass(frozen=True)
class Optimizer:
    """How gradients become updates."""

    name: Literal["adamw"] = key("AdamW as in torch: decoupled decay, eps outside the root", "adamw")
    learning_rate: float = key("peak", 2e-4)
    schedule: Literal["constant", "linear", "cosine"] = key("after warmup, down to final_fraction", "cosine")
    warmup_steps: int = key("linear from 0 to the peak", 10)
    final_fraction: float = key("of the peak, where linear and cosine end", 0.0)
    weight_decay: float = key("decoupled", 0.0)
    decay: Literal["all", "matrices"] = key("which trainable weights decay: all, or all but norms", "all")
    b1: float = key("decay of the first moment", 0.9)
    b2: float = key("decay of the second moment", 0.999)
    eps: float = key("added to the root of the second moment", 1e-8)
    clip_norm: float | None = key("largest global gradient norm; null: no clipping", 1.0)


@dataclass(frozen=True)
class Train:
    """How long, how much at a time, in which precision."""

    steps: int | None = key("optimizer updates; 200 where epochs is absent too", None)
    epochs: float | None = key("instead of steps: passes over the training rows", None)
    batch_size: int = key("rows per update, over all devices and hosts", 8)
    microbatches: int = key("pieces in which a batch is computed; divides batch_size", 1)
    dtype: Literal["bfloat16", "float32"] = key(
        "of matmuls and activations; weights that train stay float32", "bfloat16"
    )
    remat: Literal["none", "block", "dots"] = key("what is computed again in the backward pass to save memory", "block")
    seed: int = key("of data order and initial values", 0)


def check_optimization(optimizer: Optimizer, train: Train, require: Callable[[bool, str, str], None]) -> None:
    """Raises LlmtuneConfigError naming the key; `require(condition, path, said)` is how a run says it."""
    require(train.steps is None or train.epochs is None, "train", "steps and epochs are both given; give one of them")
    require(train.steps is None or 0 < train.steps < 2**31, "train.steps", f"{train.steps} must lie in 1..2147483647")
    require(train.epochs is None or 0 < train.epochs < math.inf, "train.epochs", f"{train.epochs} must be positive")
    require(train.batch_size > 0, "train.batch_size", f"{train.batch_size} must be positive")
    require(
        train.microbatches > 0 and train.batch_size % train.microbatches == 0,
        "train.microbatches",
        f"{train.microbatches} does not divide train.batch_size {train.batch_size}",
    )
    require(0 <= train.seed < 2**31, "train.seed", f"{train.seed} must lie in 0..2147483647")
    for name in ("learning_rate", "eps"):
        value = getattr(optimizer, name)
        require(0 < value < math.inf, f"optimizer.{name}", f"{value} must be a positive number")
    for name in ("weight_decay", "final_fraction"):
        value = getattr(optimizer, name)
        require(0 <= value < math.inf, f"optimizer.{name}", f"{value} must be 0 or more")
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        require(0 <= value < 1, f"optimizer.{name}", f"{value} must lie in [0, 1)")
    require(optimizer.warmup_steps >= 0, "optimizer.warmup_steps", f"{optimizer.warmup_steps} must be 0 or more")
    require(
        optimizer.clip_norm is None or optimizer.clip_norm > 0,
        "optimizer.clip_norm",
        "must be positive, or null for none",
    )
