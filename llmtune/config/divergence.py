"""What becomes of bad steps: the keys under `divergence`."""

from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key
from llmtune.config.optimizers import Require


@dataclass(frozen=True)
class Divergence:
    """Steps whose loss or gradient is no number, or far beyond the usual."""

    non_finite: Literal["skip", "apply"] = key(
        "a step whose loss or gradient is no number is skipped (weights, moments and schedule stay), or applied", "skip"
    )
    in_a_row: int = key("so many skipped steps in a row end the run with code 76", 5)
    spikes: Literal["off", "warn", "skip", "roll_back", "stop"] = key(
        "a step far beyond the usual: not looked for, applied and said, skipped, skipped with a return to the last checkpoint's "
        "weights (the data goes on), or the end of the run with code 76",
        "off",
    )
    window: int = key("how many steps say what is usual", 128)
    sigmas: float = key("standard deviations above the mean that loss or gradient norm may lie", 6.0)


def check_divergence(divergence: Divergence, require: Require) -> None:
    """Raises LlmtuneConfigError naming the key."""
    for name in ("in_a_row", "sigmas"):
        value = getattr(divergence, name)
        require(value > 0, f"divergence.{name}", f"{value} must be positive")
    require(divergence.window >= 8, "divergence.window", f"{divergence.window} is too short to judge by; 8 or more")
    require(
        divergence.spikes in ("off", "warn") or divergence.non_finite == "skip",
        "divergence.non_finite",
        f"spikes: {divergence.spikes} skips steps; set non_finite: skip",
    )
