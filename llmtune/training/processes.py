"""Runs of several processes: all compute, the first one writes what is the same for all.

    if is_first():
        write_report(directory)

Checkpoints are not among it: there every process writes its part. An export takes all of them to produce, and one to write.
"""

from collections.abc import Sequence
from typing import final

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

TOLD = 400  # bytes that one process tells the others
PIECE = 64 << 20  # bytes that travel at a time


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Until every process has come to `moment`: what the first writes next, no other still looks for."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def highest(values: Sequence[int]) -> list[int]:
    """The highest of each value among all processes, known to all: what one of them was told, all act upon at the same step."""
    if jax.process_count() == 1:
        return list(values)
    return np.max(multihost_utils.process_allgather(np.asarray(values, np.int32)), axis=0).tolist()


def first_told(text: str | None) -> str | None:
    """What the first process that has something to say says, known to all; None where none has. At most TOLD bytes of it."""
    if jax.process_count() == 1:
        return text
    own = np.zeros(TOLD, np.uint8)
    said = (text or "").encode()[:TOLD]
    own[: len(said)] = list(said)
    told = (bytes(row.tolist()).rstrip(b"\0") for row in multihost_utils.process_allgather(own))
    return next((row.decode(errors="ignore") for row in told if row), None)


@final
class AllProcesses:
    """Those of the run, who read the data together: `Peers` of llmtune.data.pooling."""

    @property
    def index(self) -> int:
        """Of this process."""
        return jax.process_index()

    @property
    def count(self) -> int:
        """Of processes."""
        return jax.process_count()

    def gather(self, own: np.ndarray) -> list[np.ndarray]:
        """Every process's array of one axis, in the order of processes: all at once where they are small, else one by one."""
        if self.count == 1:
            return [own]
        raw = own.view(np.uint8)
        halves = multihost_utils.process_allgather(np.array(divmod(len(raw), 1 << 30), np.int32)).tolist()
        sizes = [high << 30 | low for high, low in halves]
        largest = max(sizes)
        if largest * self.count <= PIECE:
            rows = multihost_utils.process_allgather(np.pad(raw, (0, largest - len(raw))))
            return [row[:size].copy().view(own.dtype) for row, size in zip(rows, sizes, strict=True)]
        found = [np.empty(size, np.uint8) for size in sizes]
        for process, whole in enumerate(found):
            for start in range(0, len(whole), PIECE):
                piece = np.zeros(PIECE, np.uint8)
                if process == self.index:
                    piece[: len(raw) - start] = raw[start : start + PIECE]
                told = multihost_utils.broadcast_one_to_all(piece, is_source=process == self.index)
                whole[start : start + PIECE] = told[: len(whole) - start]
        return [whole.view(own.dtype) for whole in found]


def held_rows(layout: NamedSharding, rows: int) -> np.ndarray:
    """Which of so many rows, laid out like this, the devices of this process hold: ascending, each once.

    Processes hold the same rows where it is something else that they divide (heads, experts, the sequence).
    """
    held = layout.addressable_devices_indices_map((rows,)).values()
    return np.unique([row for index in held for row in range(*index[0].indices(rows))])  # type: ignore[index]
