"""Partition, then differentiate: split a tree of weights into what trains and what stays, as two trees with holes.

    partition({"q": LoRA(W, a, b, s)})  -->  ({"q": LoRA(None, a, b, None)}, {"q": LoRA(W, None, None, s)})

`jax.grad` is taken over the first alone: a frozen weight has no gradient, no optimizer state and costs no FLOP backward.
"""

from collections.abc import Callable
from typing import Any

import jax

from llmtune.weights import is_operator, map_fields, path_name

Trains = Callable[[str, Any], bool]  # of one weight: its path, and the array or operator


def adapters(path: str, weight: Any) -> bool:
    """Only operators train (their trainable fields): adapters on a frozen base."""
    del path
    return is_operator(weight)


def everything(path: str, weight: Any) -> bool:
    """Every plain array trains, and every trainable field of an operator."""
    del path, weight
    return True


def partition(params: Any, trains: Trains) -> tuple[Any, Any]:
    """(trainable, frozen): two trees of the same structure, each with None where the other has an array."""

    def split(keep: bool) -> Any:
        def pick(path: tuple[Any, ...], weight: Any) -> Any:
            chosen = trains(path_name(path), weight)
            return map_fields(lambda leaf, trainable: leaf if (chosen and trainable) == keep else None, weight)

        return jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_operator)

    return split(True), split(False)


def combine(trainable: Any, frozen: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda leaf: leaf is None)
