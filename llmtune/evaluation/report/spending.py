"""What the time of a run went into, from its first start to its last end: steps that count, and everything else.

    |-- steps --|-- compiling --|-- evaluating, saving, reading, steps done twice --|-- between sessions --|

Of a session that was killed, what is known ends with its last checkpoint; the rest of it counts as between sessions.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from llmtune.evaluation.report import units
from llmtune.evaluation.report.record import Record


@dataclass(frozen=True)
class Spending:
    """Seconds; `wall` is the sum of the others."""

    steps: float
    compiling: float
    other: float
    between: float
    restarts: int

    @property
    def wall(self) -> float:
        """From the first start to the last end."""
        return self.steps + self.compiling + self.other + self.between

    @property
    def goodput(self) -> float:
        """The share that went into steps that count."""
        return self.steps / self.wall if self.wall else 0.0

    @property
    def parts(self) -> list[tuple[str, str, float, str]]:
        """(label, colour, share, seconds in words), of what took time at all."""
        named = (
            ("training steps", "--first", self.steps),
            ("compiling", "--second", self.compiling),
            ("reading, evaluating, saving, steps done twice", "--third", self.other),
            ("between sessions", "--soft", self.between),
        )
        return [
            (name, colour, own / self.wall, units.duration(own))
            for name, colour, own in named
            if own > 0.001 * self.wall
        ]


def spending(record: Record) -> Spending | None:
    """None of a run without sessions, or whose rows do not tell their seconds."""
    sessions, steps = record.sessions, sum(row.get("seconds", 0.0) for row in record.rows)
    if not sessions or not steps:
        return None
    compiling = sum(session.get("compile_seconds", 0.0) for session in sessions)
    working = sum(session.get("seconds", 0.0) for session in sessions)
    begun, *_ = (_moment(session["started"]) for session in sessions)
    ended = max(_end(session) for session in sessions)
    other = max(0.0, working - steps - compiling)
    between = max(0.0, (ended - begun).total_seconds() - steps - compiling - other)
    return Spending(steps, compiling, other, between, len(record.working_sessions) - 1)


def _end(session: dict) -> datetime:
    if session.get("ended"):
        return _moment(session["ended"])
    return _moment(session["started"]) + timedelta(seconds=session.get("seconds", 0.0))


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
