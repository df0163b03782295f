"""The `optimizer` section: one small dataclass for each optimizer, chosen by `name`; what all share stands in the first.

    optimizer: {learning_rate: 2.0e-4}                        AdamW, where none is named
    optimizer: {name: muon, momentum: 0.95, rates: {embed_tokens: 0.1}}

A new optimizer is a dataclass here, a transformation in `llmtune/optimizers`, and a row in `llmtune/optimizers/choose.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from llmtune.config.key import key

Require = Callable[[bool, str, str], None]  # (condition, key, what is said where it does not hold)
FIRST, SECOND = "decay of the first moment", "decay of the second moment"
RULES = "written like adapt.targets, or norm, embed_tokens, lm_head, or regular expressions on paths"


@dataclass(frozen=True)
class OptimizerSection:
    """What all optimizers share: the learning rate over time, who decays, clipping."""

    name: str
    learning_rate: float = key("peak", 2e-4)
    schedule: Literal["constant", "linear", "cosine", "wsd", "polynomial", "inverse_sqrt"] = key(
        "after warmup, down to final_fraction", "cosine"
    )
    warmup_steps: int = key("linear from 0 to the peak", 10)
    final_fraction: float = key("of the peak, where schedules but the constant one end, and which none goes below", 0.0)
    decay_fraction: float = key("of all steps: how long wsd (warmup, stable, decay) goes down at its end", 0.2)
    power: float = key("of the polynomial schedule", 2.0)
    weight_decay: float = key("per update, times the learning rate", 0.0)
    decay: Literal["all", "matrices"] = key("which trainable weights decay: all, or all but norms", "all")
    undecayed: list[str] = key(f"more weights that do not decay, {RULES}", [])
    rates: dict[str, float] = key(f"other learning rates, in that of all: {{embed_tokens: 0.1}}; {RULES}", {})
    clip_norm: float | None = key("largest global gradient norm; null: no clipping", 1.0)
    memory: Literal["device", "host"] = key(
        "where the optimizer's state waits between updates; host: in that of the machine, for TPUs and GPUs", "device"
    )

    def check(self, require: Require) -> None:
        """What no single field can say. Fields of subclasses are checked by what they are called."""
        for name in ("learning_rate", "eps", "power", "clip_threshold"):
            value = getattr(self, name, 1.0)
            require(0 < value < math.inf, f"optimizer.{name}", f"{value} must be a positive number")
        require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", f"{self.weight_decay} must be 0 or more")
        for name in ("final_fraction", "decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name}", f"{value} must lie in 0..1")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name, 0.0)
            require(0 <= value < 1, f"optimizer.{name}", f"{value} must lie in [0, 1)")
        for rule, rate in self.rates.items():
            require(0 <= rate < math.inf, f"optimizer.rates.{rule}", f"{rate} must be 0 or more")
        warmup = self.warmup_steps
        require(0 <= warmup < 2**31, "optimizer.warmup_steps", f"{warmup} must lie in 0..2147483647")
        averages = self.name == "schedule_free_adamw"
        require(
            self.memory == "device" or not averages,
            "optimizer.memory",
            "schedule_free_adamw needs its state for every evaluation: device",
        )
        clip = self.clip_norm
        require(clip is None or clip > 0, "optimizer.clip_norm", "must be positive, or null for none")


@dataclass(frozen=True)
class AdamW(OptimizerSection):
    """AdamW as in torch: decoupled decay, eps outside the root."""

    name: Literal["adamw"] = key("which optimizer", "adamw")
    b1: float = key(FIRST, 0.9)
    b2: float = key(SECOND, 0.999)
    eps: float = key("added to the root of the second moment", 1e-8)


@dataclass(frozen=True)
class AdamW8bit(OptimizerSection):
    """AdamW whose moments are kept in 8 bits, a scale for each block of up to 256 numbers."""

    name: Literal["adamw_8bit"] = key("which optimizer", "adamw_8bit")
    b1: float = key(FIRST, 0.9)
    b2: float = key(SECOND, 0.999)
    eps: float = key("added to the root of the second moment", 1e-8)


@dataclass(frozen=True)
class Adafactor(OptimizerSection):
    """Second moments as the product of their row and column means; no first moment."""

    name: Literal["adafactor"] = key("which optimizer", "adafactor")
    decay_exponent: float = key("the second moment of update t decays by 1 - t^-this", 0.8)
    clip_threshold: float = key("largest root mean square of one matrix's update, before the learning rate", 1.0)
    scale_by_parameter: bool = key("the learning rate is in units of a matrix's own root mean square", False)

    def check(self, require: Require) -> None:
        """What no single field can say."""
        super().check(require)
        given = self.decay_exponent
        require(0 < given <= 1, "optimizer.decay_exponent", f"{given} must lie in (0, 1]")


@dataclass(frozen=True)
class Lion(OptimizerSection):
    """The sign of an interpolated momentum; wants about a tenth of AdamW's learning rate, and ten times its decay."""

    name: Literal["lion"] = key("which optimizer", "lion")
    b1: float = key("share of the momentum in the update", 0.9)
    b2: float = key("decay of the momentum", 0.99)


@dataclass(frozen=True)
class Muon(OptimizerSection):
    """Orthogonalised momentum for the matrices of layers, AdamW for all other weights."""

    name: Literal["muon"] = key("which optimizer", "muon")
    momentum: float = key("decay of the momentum of matrices", 0.95)
    nesterov: bool = key("the update looks one step of the momentum ahead", True)
    iterations: int = key("of Newton and Schulz", 5)
    adjust: Literal["match_rms_adamw", "original"] = key(
        "updates as large as AdamW's, so that both share a learning rate, or as Jordan scaled them", "match_rms_adamw"
    )
    b1: float = key("AdamW's, of the other weights", 0.9)
    b2: float = key("AdamW's, of the other weights", 0.999)
    eps: float = key("AdamW's, of the other weights", 1e-8)

    def check(self, require: Require) -> None:
        """What no single field can say."""
        super().check(require)
        require(0 < self.iterations <= 100, "optimizer.iterations", f"{self.iterations} must lie in 1..100")


@dataclass(frozen=True)
class SGD(OptimizerSection):
    """Gradient descent as in torch: the decay is a part of the gradient."""

    name: Literal["sgd"] = key("which optimizer", "sgd")
    momentum: float = key("0: none, and no state", 0.0)
    nesterov: bool = key("the update looks one step of the momentum ahead", False)

    def check(self, require: Require) -> None:
        """What no single field can say."""
        super().check(require)
        require(
            self.momentum > 0 or not self.nesterov, "optimizer.nesterov", "it needs a momentum; set optimizer.momentum"
        )


@dataclass(frozen=True)
class ScheduleFreeAdamW(OptimizerSection):
    """AdamW that averages its iterates instead of letting the learning rate fall; evaluates and exports the average."""

    name: Literal["schedule_free_adamw"] = key("which optimizer", "schedule_free_adamw")
    schedule: Literal["constant"] = key("after warmup; the average stands for a falling one", "constant")
    b1: float = key("share of the average in the point where gradients are taken", 0.9)
    b2: float = key(SECOND, 0.999)
    eps: float = key("added to the root of the second moment", 1e-8)


Optimizer = AdamW | AdamW8bit | Adafactor | Lion | Muon | SGD | ScheduleFreeAdamW  # the first is the default
OPTIMIZERS: dict[str, type] = {kind.name: kind for kind in get_args(Optimizer)}
