"""How long a run is, how much it computes at a time and in which precision: the keys under `train`."""

import math
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key
from llmtune.config.optimizers import Require


@dataclass(frozen=True)
class Train:
    """How long, how much at a time, in which precision."""

    steps: int | None = key("optimizer updates; 200 where epochs is absent too", None)
    epochs: float | None = key("instead of steps: passes over the training rows", None)
    batch_size: int = key("rows per update, over all devices and hosts", 8)
    microbatches: int = key("pieces in which a batch is computed; divides batch_size", 1)
    dtype: Literal["bfloat16", "float16", "float32"] = key("of matmuls and activations", "bfloat16")
    masters: Literal["float32", "bfloat16"] = key(
        "of weights that train, as they are kept; bfloat16 is half the bytes, and rounded by chance so that no update is lost",
        "float32",
    )
    loss_scale: float = key("float16: where the dynamic loss scale begins", 65536.0)
    loss_scale_interval: int = key("float16: steps without overflow after which it doubles", 2000)
    remat: Literal["none", "dots", "attention", "block", "offload"] = key(
        "what is computed again in the backward pass to save memory: nothing; all but products; all but attention; all of a "
        "block; the same, and what a block begins with waits in the host's memory",
        "block",
    )
    seed: int = key("of data order and initial values", 0)


def check_train(train: Train, require: Require) -> None:
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
    require(0 < train.loss_scale < math.inf, "train.loss_scale", f"{train.loss_scale} must be a positive number")
    interval = train.loss_scale_interval
    require(interval > 0, "train.loss_scale_interval", f"{interval} must be positive")
    require(0 <= train.seed < 2**31, "train.seed", f"{train.seed} must lie in 0..2147483647")
