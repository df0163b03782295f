"""Packing is planned, not streamed: from lengths to rows, a pure function of (seed, epoch, lengths).

Because the plan is global, every host can take its share of each batch, any step can be read by itself, and resuming is a
matter of knowing the step. Each example stands in exactly one row of an epoch (in a mixture: in as many as its weight says).
"""

import bisect
from dataclasses import dataclass

import numpy as np

from llmtune.data.mixture import Mixture

BINS = 256  # rows that are open at a time while packing
AGE = 40  # bits of a row's number
MASK = (1 << AGE) - 1


@dataclass(frozen=True)
class Plan:
    """Rows of one epoch: row r holds the examples `order[starts[r]:starts[r + 1]]`."""

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """The examples of one row."""
        return self.order[self.starts[index] : self.starts[index + 1]]


def plan_epoch(
    lengths: np.ndarray,
    sequence_length: int,
    *,
    seed: int,
    epoch: int,
    packing: bool,
    shuffle: bool,
    mixture: Mixture | None = None,
) -> Plan:
    """The rows of an epoch. Without packing each example has its own; without shuffling, in file order.

    `mixture` says how often each example comes; without one, each comes once.
    """
    chosen = np.arange(len(lengths)) if mixture is None else mixture.choose(epoch, seed=seed, shuffle=shuffle)
    order = np.random.default_rng((seed, epoch)).permutation(chosen) if shuffle else chosen
    if not packing:
        return Plan(order, np.arange(len(order) + 1))
    row_of = best_fit(lengths[order], sequence_length)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Plan(order[np.argsort(row_of, kind="stable")], starts)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each example: the fullest open row that still has room for it, the oldest of equally full ones.

    A bounded number of rows is open, the oldest being closed first, so the order stays close to the given one. Open rows lie
    sorted by (room, age) in one list of integers, so that an example costs a bisection.
    """
    row_of: list[int] = []
    open_rows: list[int] = []  # room << AGE | row
    room: list[int] = []  # by row
    oldest = 0
    for length in lengths.tolist():
        at = bisect.bisect_left(open_rows, length << AGE)
        if at < len(open_rows):
            row = open_rows.pop(at) & MASK
            room[row] -= length
        else:
            row = len(room)
            room.append(capacity - length)
        row_of.append(row)
        bisect.insort(open_rows, room[row] << AGE | row)
        if len(open_rows) > BINS:
            del open_rows[bisect.bisect_left(open_rows, room[oldest] << AGE | oldest)]
            oldest += 1
    return np.array(row_of, np.int64)
