"""Weighted mixtures: a weight is how many times an epoch passes through that source.

    - {path: chats.jsonl}                    weight 1: every example once an epoch, as without a mixture
    - {path: code.jsonl, weight: 0.25}       a quarter of the examples, the next quarter in the next epoch, ...
    - {path: rules.jsonl, weight: 3}         every example three times an epoch

A source is an endless stream of passes, each in an order of its own; epoch e takes the part of it between weight * e and
weight * (e + 1) passes. So no example comes a second time before all have come once, and an epoch is a pure function of
(seed, epoch, sizes, weights).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Mixture:
    """Sources lie one after the other: the first has `sizes[0]` examples, and so on."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def choose(self, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
        """The examples of an epoch, source by source: int64 indices."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        return np.concatenate([
            start + _stream(size, math.floor(epoch * weight * size), math.floor((epoch + 1) * weight * size), key)
            for start, size, weight, key in zip(
                starts.tolist(),
                self.sizes,
                self.weights,
                [(seed, source) if shuffle else None for source in range(len(self.sizes))],
                strict=True,
            )
        ])  # fmt: skip


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """`chats` of `data/chats.jsonl.gz`; where several would be called the same, a number follows."""
    stems = [Path(path).name.split(".")[0] or path for path in paths]
    names = tuple(stem if stems.count(stem) == 1 else f"{stem}-{n}" for n, stem in enumerate(stems, 1))
    if len(set(names)) == len(names):
        return names
    return tuple(f"{stem}-{n}" for n, stem in enumerate(stems, 1))  # a file is called as a number made another


def _stream(size: int, begin: int, end: int, key: tuple[int, int] | None) -> np.ndarray:
    """Places begin..end of the passes through `size` examples."""
    parts = [np.zeros(0, np.int64)]
    while begin < end:
        number, first = divmod(begin, size)
        last = min(size, first + end - begin)
        order = np.arange(size) if key is None else np.random.default_rng((*key, number)).permutation(size)
        parts.append(order[first:last])
        begin += last - first
    return np.concatenate(parts)
