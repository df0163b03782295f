"""What an adapter is made of, for those who store it: the base beneath it, and its own values.

    LoRA(LoRA(W, a0, b0, -s, taken=True), a, b, s)   -->  beneath: W, factors: [a a0], [b; -b0], s

An initialiser's part (`taken`) belongs to the adapter around it: together they are one of both ranks, on the base as it was.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from llmtune.weights.dora import DoRA
from llmtune.weights.lora import LoRA
from llmtune.weights.operator import Operator


@dataclass(frozen=True)
class LowRankValues:
    """a [..., in, rank], b [..., rank, out], scale [...], magnitude [..., out] (of DoRA, else None); see `LoRA`."""

    a: Any
    b: Any
    scale: Any
    magnitude: Any
    ranks: tuple[int, ...] | None
    rslora: bool
    dropout: float


def is_adapter(weight: Any) -> bool:
    """An operator that trains; a quantised weight is none."""
    return isinstance(weight, Operator) and bool(weight.trainable)


def beneath(weight: Any) -> Any:
    """What the outermost adapter stands on."""
    base = weight.base
    return base.base if isinstance(base, LoRA) and base.taken else base


def low_rank_values(weight: Any) -> LowRankValues | None:
    """The values of a LoRA or DoRA, those of an initialiser's part joined to it; None of anything else."""
    low = weight.low if isinstance(weight, DoRA) else weight
    if not isinstance(low, LoRA):
        return None
    a, b, ranks, magnitude = low.a, low.b, low.ranks, weight.magnitude if isinstance(weight, DoRA) else None
    if isinstance(low.base, LoRA) and low.base.taken:
        a = jnp.concatenate([a, low.base.a], axis=-1)
        b = jnp.concatenate([b, -low.base.b], axis=-2)
        ranks = None if ranks is None else tuple(2 * rank for rank in ranks)
    return LowRankValues(a, b, low.scale, magnitude, ranks, low.rslora, low.dropout)
