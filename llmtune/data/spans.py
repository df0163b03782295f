"""Files divided among processes: of `count` shares each has the rows that begin in its part of all bytes, in order.

    a.jsonl |.......|.......|.......|    b.csv |...|    c.parquet |.....|......|
    share 0 ^-------------^  share 1 ^-------------------------^   share 2 ^---^

JSON lines are divided at lines and parquet files at row groups. Any other file is read whole by whoever has its first byte:
in the middle of it nobody could say where a row begins.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PIECE = 1 << 20
DIVISIBLE = (".jsonl", ".parquet")  # and not compressed


@dataclass(frozen=True)
class Span:
    """The rows of a file that begin in its bytes `begin` to `end` (None: its last)."""

    path: Path
    begin: int = 0
    end: int | None = None

    def has(self, at: int) -> bool:
        """Whether what begins at a byte is in it."""
        return at >= self.begin and (self.end is None or at < self.end)

    @functools.cached_property
    def lines_before(self) -> int:
        """Lines of the file that begin before it."""
        if self.begin == 0:
            return 0
        with self.path.open("rb") as file:
            left, count = self.begin - 1, 1
            while left and (piece := file.read(min(left, PIECE))):
                left -= len(piece)
                count += piece.count(b"\n")
        return count


@dataclass(frozen=True, slots=True)
class Line:
    """The `number`-th line that begins in a span; as a text `file:line`, for which what lies before it is counted then."""

    span: Span
    number: int

    def __str__(self) -> str:
        return f"{self.span.path}:{self.span.lines_before + self.number}"


Where = str | Line  # of a row, for messages


def share_of(paths: Sequence[Path], sizes: Sequence[int], index: int, count: int) -> Iterator[Span]:
    """What the `index`-th of `count` reads of files of so many bytes.

    All shares, one after the other, are all rows in their order, each once.
    """
    first, last = (sum(sizes) * part // count for part in (index, index + 1))
    start = 0
    for path, size in zip(paths, sizes, strict=True):
        begin, end = max(first - start, 0), min(last - start, size)
        start += size
        if begin < end and path.suffix.lower() in DIVISIBLE:
            yield Span(path, begin, None if end == size else end)
        elif begin == 0 < end:
            yield Span(path)


def enter(file: BinaryIO, span: Span) -> None:
    """Move to the first line that begins in the span."""
    if span.begin:
        file.seek(span.begin - 1)  # where a line ends right before the span, no line is lost
        while (passed := file.readline(PIECE)) and not passed.endswith(b"\n"):
            pass
