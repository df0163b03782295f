"""Where the rows of a run go: metrics.jsonl, which the report reads, and TensorBoard beside it.

A tracker takes a row (plain numbers by name) per step and is closed at the end. The loop knows no more than that.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmtune.training.processes import is_first
from llmtune.training.run_directory import RunDirectory

Row = dict[str, Any]
FLUSH_SECONDS = 10  # what a killed run may miss in TensorBoard; metrics.jsonl misses nothing


class Tracker(Protocol):
    """Takes rows, each with its `step`."""

    def log(self, row: Row) -> None:
        """One step."""
        ...

    def close(self) -> None:
        """No more rows."""
        ...


@dataclass(frozen=True)
class All:
    """A tracker that hands every row to several."""

    trackers: tuple[Tracker, ...]

    def log(self, row: Row) -> None:
        """One step, to each."""
        for tracker in self.trackers:
            tracker.log(row)

    def close(self) -> None:
        """Close each."""
        for tracker in self.trackers:
            tracker.close()


class TensorBoard:
    """Scalars of every step: `train/...`, and `evaluation/...` where there was one."""

    def __init__(self, directory: Path, after: int):
        from tensorboardX import SummaryWriter  # here, for it takes a while to import

        # purge_step: TensorBoard forgets what an earlier session wrote from that step on
        self._writer = SummaryWriter(str(directory), purge_step=after + 1, flush_secs=FLUSH_SECONDS)

    def log(self, row: Row) -> None:
        """A scalar for each number but the step."""
        for name, value in row.items():
            if name != "step":
                group, own = ("evaluation", name.removeprefix("eval_")) if name.startswith("eval_") else ("train", name)
                self._writer.add_scalar(f"{group}/{own}", value, row["step"])

    def close(self) -> None:
        """Write what is held back."""
        self._writer.close()


@contextlib.contextmanager
def open_trackers(directory: RunDirectory, after: int) -> Iterator[Tracker]:
    """The trackers of a run that goes on after step `after`: what they hold of later steps is cut or forgotten.

    In all processes but the first there are none.
    """
    if not is_first():
        yield All(())
        return
    directory.metrics.cut_after(after)
    tracker = All((directory.metrics, TensorBoard(directory.tensorboard, after)))
    try:
        yield tracker
    finally:
        tracker.close()
