"""Where a layer lies when a model's layers are cut into several stacks, as those of which only some train.

    layers/0/attention/q/kernel [3]   --stacks of 2 and 6 layers-->   layers/1/attention/q/kernel [1]

Tables of names (`hf_names`) know one stack; the cut is made here, from the depths of the stacks that a tree of weights has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from checkpoints_convert.hf_names import SEGMENT, Tensor

NORM = "attention_norm/weight"  # every layer has one, and it is never an operator


def depths(weights: Mapping[str, Any]) -> list[int]:
    """How many layers each stack holds; `weights`: arrays or their declarations, by path."""
    found = []
    while (path := f"layers/{len(found)}/{NORM}") in weights:
        found.append(weights[path].shape[0])
    return found


def placed(path: str, index: tuple[int, ...], stacks: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """A path and a place in one stack of all layers -> those in these stacks."""
    if not path.startswith(f"{SEGMENT}/"):
        return path, index
    layer, number = index[0], 0
    while layer >= stacks[number]:
        layer, number = layer - stacks[number], number + 1
    return f"layers/{number}/{path.removeprefix(f'{SEGMENT}/')}", (layer, *index[1:])


def in_stacks(tensor: Tensor, stacks: Sequence[int]) -> Tensor:
    """The same tensor, lying in its stack."""
    path, index = placed(tensor.path, tensor.index, stacks)
    return replace(tensor, path=path, layer=index[0]) if index else tensor
