"""Documents from files too large for memory or disk: read as they are needed, packed as they come, taken up again by position.

    position -> batch, next position        a pure function of (files, seed, weights)

Each source is an endless series of passes over its files. A pass has an order of files of its own, and files are shuffled by
blocks of BLOCK rows (neighbours in a block come mixed, blocks come in order); without shuffling, all come as they lie. The next
document is of the source that is furthest behind its share of the tokens. Documents fill rows one after the other and are cut
at the end of a row; what is left begins the next row as a document of its own.
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.data.batches import HostBatch
from llmtune.data.example import IGNORED, Example
from llmtune.data.invalid import Refuse, stop
from llmtune.data.rows import Row, read_rows
from llmtune.errors import LlmtuneDataError

BLOCK = 1024
Read = Callable[[Iterator[Row]], Iterator[Example]]  # rows -> examples, as the source's format says


@dataclass(frozen=True)
class Cursor:
    """Where a source stands: `taken` documents of block `block` of the `file`-th file of a pass were given."""

    epoch: int = 0
    file: int = 0
    block: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Position:
    """Where a stream stands between two batches: a cursor and the tokens given, of each source; and a document that is cut.

    `current`: its source (-1: none), whose cursor stands before it; `offset`: the tokens of it that were given.
    """

    cursors: tuple[Cursor, ...]
    drawn: tuple[int, ...]
    current: int = -1
    offset: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Position":
        """What `to_json` gave."""
        cursors = tuple(Cursor(**own) for own in value["cursors"])
        return Position(cursors, tuple(value["drawn"]), value["current"], value["offset"])


@dataclass(frozen=True)
class StreamedSource:
    """One source: its files, how its rows are read, and its share of the tokens (relative to the others')."""

    paths: tuple[Path, ...]
    read: Read
    weight: float
    key: tuple[int, ...] | None  # of its orders; None: as the files lie
    refuse: Refuse = stop  # what becomes of a row that cannot be used

    def documents(self, start: Cursor) -> Iterator[tuple[Example, Cursor]]:
        """From there on without end: (document, where the source stands after it)."""
        cursor = start
        while True:
            before = cursor
            for number in range(cursor.file, len(self.paths)):
                path = self.paths[self._order(len(self.paths), cursor.epoch)[number]]
                first = cursor.block if number == cursor.file else 0
                for block, rows in self._blocks(path, first):
                    skipped = cursor.taken if (number, block) == (cursor.file, cursor.block) else 0
                    order = self._order(len(rows), cursor.epoch, number, block)
                    examples = self.read(rows[place] for place in order)
                    for taken, example in enumerate(itertools.islice(examples, skipped, None), skipped + 1):
                        cursor = Cursor(before.epoch, number, block, taken)
                        yield example, cursor
            if cursor == before == Cursor(before.epoch):
                raise LlmtuneDataError(f"{self.paths[0]}: a pass over these files gave no document")
            cursor = Cursor(before.epoch + 1)

    def _blocks(self, path: Path, first: int) -> Iterator[tuple[int, list[Row]]]:
        rows = itertools.islice(read_rows([path], self.refuse), first * BLOCK, None)
        for block in itertools.count(first):
            held = list(itertools.islice(rows, BLOCK))
            if not held:
                return
            yield block, held

    def _order(self, size: int, *of: int) -> Sequence[int]:
        return range(size) if self.key is None else np.random.default_rng((*self.key, *of)).permutation(size).tolist()


@dataclass(frozen=True)
class Stream:
    """Batches of rows of exactly `sequence_length` tokens; a process gets its `share` of the rows of each (None: all)."""

    sources: tuple[StreamedSource, ...]
    batch_size: int
    sequence_length: int
    share: tuple[int, ...] | None = None

    def start(self) -> Position:
        """Before the first batch."""
        return Position((Cursor(),) * len(self.sources), (0,) * len(self.sources))

    def batches(self, position: Position) -> Iterator[tuple[HostBatch, Position]]:
        """From there on without end: (batch, where the stream stands after it)."""
        pieces = self._pieces(position)
        begun = False
        while True:
            batch = _empty(self.batch_size, self.sequence_length, len(self.sources) > 1)
            for row in range(self.batch_size):
                at, segment = 0, 0
                while at < self.sequence_length:
                    room = self.sequence_length - at
                    source, ids, labels, position = pieces.send(room) if begun else next(pieces)
                    begun = True
                    segment += 1
                    span = slice(at, at + len(ids))
                    batch["tokens"][row, span], batch["labels"][row, span] = ids, labels
                    batch["labels"][row, at] = IGNORED
                    batch["segment_ids"][row, span] = segment
                    batch["positions"][row, span] = np.arange(len(ids))
                    if len(self.sources) > 1:
                        batch["source_ids"][row, span] = source
                    at += len(ids)
            own = list(range(self.batch_size) if self.share is None else self.share)
            yield {name: rows[own] for name, rows in batch.items()}, position

    def _pieces(self, position: Position) -> Generator[tuple[int, np.ndarray, np.ndarray, Position], int, None]:
        """A generator that is sent the room left in a row and gives (source, ids, labels, position after them)."""
        readers = [own.documents(cursor) for own, cursor in zip(self.sources, position.cursors, strict=True)]
        cursors, drawn, room = list(position.cursors), list(position.drawn), self.sequence_length
        current, offset = position.current, position.offset
        while True:
            source = current if current >= 0 else self._next_source(drawn)
            example, after = next(readers[source])
            while offset < len(example.input_ids):
                span = slice(offset, offset + room)
                ids, labels = example.input_ids[span], example.labels[span]
                offset += len(ids)
                drawn[source] += len(ids)
                whole = offset >= len(example.input_ids)
                if whole:
                    cursors[source] = after
                now = Position(tuple(cursors), tuple(drawn), -1 if whole else source, 0 if whole else offset)
                room = yield source, ids, labels, now
            current, offset = -1, 0

    def _next_source(self, drawn: list[int]) -> int:
        return min(range(len(drawn)), key=lambda own: (drawn[own] / self.sources[own].weight, own))


def _empty(rows: int, length: int, mixed: bool) -> HostBatch:
    names = ("tokens", "segment_ids", "positions", *(("source_ids",) if mixed else ()))
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return {**batch, "labels": np.full((rows, length), IGNORED, np.int32)}
