"""What the rows of a run go to: a tracker takes a row (plain numbers by name) per step and is closed at the end.

The loop knows no more than that. Files of the run itself must be written, or the run ends with a line; a service that breaks
must not take a training run with it, so that each of those is `Guarded`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

from llmtune.redaction import redact

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes rows, each with its `step`."""

    def log(self, row: Row) -> None:
        """One step."""
        ...

    def close(self) -> None:
        """No more rows."""
        ...


@dataclass(frozen=True)
class Place:
    """What a service is told of a run: where it lies, under which names it is listed, its configuration, where it goes on.

    `after`: rows up to this step were logged by an earlier session. `offline`: nothing leaves the run's directory.
    """

    directory: Path
    project: str
    name: str
    config: dict[str, Any]
    after: int
    offline: bool


@dataclass(frozen=True)
class All:
    """A tracker that hands every row to several."""

    trackers: Sequence[Tracker]

    def log(self, row: Row) -> None:
        """One step, to each."""
        for tracker in self.trackers:
            tracker.log(row)

    def close(self) -> None:
        """Close each."""
        for tracker in self.trackers:
            tracker.close()


@final
@dataclass
class Guarded:
    """A service that may break: it is said once, in a line, and the run goes on without it."""

    name: str
    open: Callable[[], Tracker]
    say: Callable[[str], None]
    tracker: Tracker | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._attempt(self._begin)

    def log(self, row: Row) -> None:
        """One step, unless it broke before."""
        if self.tracker is not None:
            self._attempt(lambda tracker=self.tracker: tracker.log(row))

    def close(self) -> None:
        """Likewise."""
        if self.tracker is not None:
            self._attempt(self.tracker.close)

    def _begin(self) -> None:
        self.tracker = self.open()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service raises: training is worth more
            self.tracker = None
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self.say(f"note: {self.name} takes no more rows ({redact(reason)}); metrics.jsonl goes on")
