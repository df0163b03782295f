"""Held-out loss: the sum of token losses over a whole data set divided by its target tokens, and its exponential."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy in nats per target token over `tokens` of them."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def held_out_loss(
    step: Callable[[Any, Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
    trainable: Any,
    frozen: Any,
    batches: Iterable[dict[str, jax.Array]],
) -> HeldOut:
    """`step` gives (loss sum, weight sum) of a batch; the sums of all batches are added in float64 on the host."""
    sums = [step(trainable, frozen, batch) for batch in batches]
    loss, tokens = np.sum(np.array(jax.device_get(sums), np.float64).reshape(-1, 2), axis=0)
    return HeldOut(float(loss / max(tokens, 1.0)), int(tokens))
