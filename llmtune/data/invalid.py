"""Rows that cannot be used: named by file and line, then refused or, where the run asks for it, left out and counted.

    data.invalid: error     the first bad row ends the command
    data.invalid: skip      bad rows are counted by reason; more than data.max_skipped of all rows ends the command

A file that is damaged as a whole (a broken archive, a json file with a syntax error) is always an error: nobody can say
which rows it had.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from llmtune.data.spans import Where
from llmtune.errors import LlmtuneDataError

SHOWN = 3  # places that a note names


class BadRow(LlmtuneDataError):
    """One row's fault: `reason` is what it is counted under."""

    def __init__(self, where: Where, said: str, reason: str):
        super().__init__(f"{where}: {said}")
        self.reason = reason


Refuse = Callable[[BadRow], None]


def stop(row: BadRow) -> NoReturn:
    """The policy `error`."""
    raise row from None


@dataclass
class Skipped:
    """The policy `skip`: how many rows for which reason, and where the first ones stand."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def __call__(self, row: BadRow) -> None:
        """Leave a row out."""
        self.reasons[row.reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(str(row))

    @property
    def total(self) -> int:
        """Rows left out."""
        return sum(self.reasons.values())

    def describe(self) -> str:
        """`3 skipped (2 not JSON, 1 not UTF-8)`."""
        parts = (f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        return f"{self.total:,} skipped ({', '.join(parts)})" if self.reasons else ""

    def require_few(self, used: int, limit: float, name: str) -> None:
        """Raise where more than `limit` of all rows were left out."""
        rows = used + self.total
        if self.total > limit * rows:
            raise LlmtuneDataError(
                f"{name}: {self.describe()} of {rows:,} rows, more than data.max_skipped {limit:g} allows; "
                f"the first: {self.first[0]}"
            )
