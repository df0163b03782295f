"""What the loop takes batches from, planned or streamed: batches from a step on, and where the data stand after each."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from llmtune.data.batches import BatchSource, HostBatch, read_batches
from llmtune.data.stream import Position, Stream

AHEAD = 4  # batches that are read while the device computes


class Feed(Protocol):
    """Batches of one run."""

    def batches(self, first: int) -> Iterator[HostBatch]:
        """Those after `first` steps, read ahead."""
        ...

    def figures(self, step: int) -> dict[str, Any]:
        """For the row of a step that is done."""
        ...

    def position(self, step: int) -> dict[str, Any] | None:
        """What must be known to go on after the step; None where its number says all."""
        ...


@final
@dataclass(frozen=True)
class Planned:
    """Rows by a plan: the step says all."""

    source: BatchSource

    def batches(self, first: int) -> Iterator[HostBatch]:
        """Read ahead on threads."""
        return read_batches(self.source, first)

    def figures(self, step: int) -> dict[str, Any]:
        """`epoch`: passes over the data."""
        return {"epoch": self.source.epoch(step)}

    def position(self, step: int) -> dict[str, Any] | None:
        """None."""
        del step


@final
@dataclass(frozen=True)
class Streamed:
    """Rows as they come. `known(step)`: the last recorded (step, position) up to a step; None: only the beginning is known."""

    stream: Stream
    steps: int
    known: Callable[[int], tuple[int, Position] | None]
    positions: dict[int, Position] = field(default_factory=dict)  # of batches that were read

    def batches(self, first: int) -> Iterator[HostBatch]:
        """From the last recorded position; batches between it and `first` are read and passed over."""
        at, position = self.known(first) or (0, self.stream.start())
        return read_ahead(self._from(at, position, first))

    def _from(self, at: int, position: Position, first: int) -> Iterator[HostBatch]:
        for step, (batch, after) in zip(range(at + 1, self.steps + 1), self.stream.batches(position), strict=False):
            self.positions[step] = after
            if step > first:
                yield batch

    def figures(self, step: int) -> dict[str, Any]:
        """`epoch`: whole passes of the source that has made the fewest."""
        return {"epoch": min(cursor.epoch for cursor in self.positions[step].cursors)}

    def position(self, step: int) -> dict[str, Any] | None:
        """Of every source, and of a document that the batch cut; what lies before it is forgotten."""
        for earlier in [own for own in list(self.positions) if own < step]:
            self.positions.pop(earlier, None)
        return self.positions[step].to_json()


def read_ahead(batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
    """The same, made by a thread, at most AHEAD of them before they are asked for; what it raises is raised here."""
    held: queue.Queue[tuple[HostBatch | None, BaseException | None]] = queue.Queue(AHEAD)

    def work() -> None:
        try:
            for batch in batches:
                held.put((batch, None))
            held.put((None, None))
        except BaseException as error:
            held.put((None, error))

    threading.Thread(target=work, name="reading ahead", daemon=True).start()
    while True:
        batch, error = held.get()
        if error is not None:
            raise error
        if batch is None:
            return
        yield batch
