"""Held-out loss: the sum of token losses over a whole data set divided by its target tokens, and its exponential.

The sums are kept by example, so that the figure can be given with its uncertainty (`llmtune.evaluation.bootstrap`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Step = Callable[[Any, Any, dict[str, jax.Array], np.ndarray], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class HeldOut:
    """Of each held-out example that has targets: `losses`, the sum of -log p in nats, and `targets`, their number.

    Both float64 [examples], in the order of the batches: two states measured on the same data are paired.
    """

    losses: np.ndarray
    targets: np.ndarray

    @property
    def loss(self) -> float:
        """Cross-entropy in nats per target token."""
        return float(self.losses.sum() / max(self.targets.sum(), 1.0))

    @property
    def tokens(self) -> int:
        """Target tokens in all."""
        return int(self.targets.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if not loss >= 700 else math.inf


def held_out_loss(
    step: Step, trainable: Any, frozen: Any, batches: Iterable[dict[str, jax.Array]], documents: int
) -> HeldOut:
    """`step` gives float32 (loss sums, weight sums) [batch, documents]; they are added up in float64 on the host."""
    numbers = np.arange(1, documents + 1, dtype=np.int32)
    sums = [step(trainable, frozen, batch, numbers) for batch in batches]
    by_row = [np.stack([np.asarray(own, np.float64).reshape(-1) for own in pair]) for pair in jax.device_get(sums)]
    losses, targets = np.concatenate(by_row or [np.zeros((2, 0))], axis=1)
    return HeldOut(losses[targets > 0], targets[targets > 0])
