"""Packing is planned, not streamed: from lengths to rows, a pure function of (seed, epoch, lengths).

Because the plan is global, every host can take its share of each batch, any step can be read by itself, and resuming is a
matter of knowing the step. Each example stands in exactly one row of an epoch.
"""

from dataclasses import dataclass

import numpy as np

BINS = 256  # rows that are open at a time while packing


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
    lengths: np.ndarray, sequence_length: int, *, seed: int, epoch: int, packing: bool, shuffle: bool
) -> Plan:
    """The rows of an epoch. Without packing each example has its own; without shuffling, in file order."""
    count = len(lengths)
    order = np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)
    if not packing:
        return Plan(order, np.arange(count + 1))
    rows = best_fit(lengths[order], sequence_length)
    starts = np.cumsum([0, *map(len, rows)])
    return Plan(order[np.concatenate(rows)], starts)


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Indices of the examples of each row: each goes into the fullest open row that still has room for it.

    A bounded number of rows is open, the oldest being closed first, so the order stays close to the given one.
    """
    open_rows: list[list[int]] = []
    room = np.zeros(0, np.int64)
    closed: list[list[int]] = []
    for index, length in enumerate(lengths.tolist()):
        fits = np.flatnonzero(room >= length)
        if len(fits):
            chosen = int(fits[np.argmin(room[fits])])
            open_rows[chosen].append(index)
            room[chosen] -= length
        else:
            open_rows.append([index])
            room = np.append(room, capacity - length)
        if len(open_rows) > BINS:
            closed.append(open_rows.pop(0))
            room = room[1:]
    return [np.array(row) for row in closed + open_rows]
