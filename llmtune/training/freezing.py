"""Layers that stay while the others train, as stacks of their own.

    8 layers, freeze_layers: 2   -->   layers/0 of 2 layers, frozen; layers/1 of 6, which train

What is frozen has no gradient, no moments and no product backward. Nor has it a backward pass at all where nothing below it
trains: under `freeze: [embed_tokens]` the lowest layers are computed once, forward.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.config.adapt import Full
from llmtune.errors import LlmtuneConfigError


@dataclass(frozen=True)
class Stack:
    """So many neighbouring layers."""

    layers: int
    frozen: bool


def stacks(sections: Sequence[Any], depth: int) -> list[Stack]:
    """The stacks of a model of so many layers, from the lowest; one of all where no section freezes layers."""
    chosen = next((section.freeze_layers for section in sections if isinstance(section, Full)), 0)
    frozen = range(chosen) if isinstance(chosen, int) else chosen
    wrong = [number for number in frozen if number >= depth]
    if wrong:
        raise LlmtuneConfigError(
            f"adapt.freeze_layers: there is no layer {wrong[0]}; the model has {depth}, counted from 0"
        )
    runs = itertools.groupby(range(depth), key=lambda number: number in frozen)
    return [Stack(len(list(run)), still) for still, run in runs]
