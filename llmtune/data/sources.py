"""One source of a mixture: files -> examples, with an account of what became of every row."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from llmtune.config import DataSource, Run
from llmtune.data.dataset import Counts, Dataset, collect, fit, require_examples
from llmtune.data.example import Example
from llmtune.data.files import DataFile, data_files, read_identity
from llmtune.data.formats import COLUMNS, Formatter, detect_format, make_formatter, read_examples, uses_template
from llmtune.data.invalid import BadRow, Skipped, stop
from llmtune.data.pooling import Alone, Found, Peers, Turned, attempt, pool, require_same_files
from llmtune.data.rows import Row, read_rows
from llmtune.data.spans import share_of
from llmtune.data.stream import Cursor, StreamedSource
from llmtune.errors import LlmtuneDataError, LlmtuneError
from llmtune.models.config import ModelConfig
from llmtune.tokenizers import Tokenizer
from llmtune.tokenizers.conversation import ChatTemplate

LOOKED_AT = 8  # documents of a stream
TRIED = 100  # rows that may be skipped before one shows the format
Tick = Callable[[int], None]


@dataclass(frozen=True)
class SourceReport:
    """What one source came to. `skipped`: rows left out, by reason; `skipped_first`: where the first of them stand."""

    key: str
    path: str
    format: str
    template: str | None
    weight: float
    counts: Counts
    skipped: Mapping[str, int]
    skipped_first: tuple[str, ...]
    files: tuple[DataFile, ...]
    license: str | None = None

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Reading:
    """What is the same for all sources of a run."""

    run: Run
    config: ModelConfig
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    peers: Peers = field(default_factory=Alone)

    def stream(self, source: DataSource, number: int) -> tuple[StreamedSource, SourceReport, str]:
        """(what reads it as it is needed, account, a line that says it) of the `number`-th training source."""
        data, paths = self.run.data, data_files(source.path)
        refuse = Skipped() if data.invalid == "skip" else stop
        columns = data.columns if source.columns is None else source.columns
        name, how, _ = _format(source.format or data.format, paths, columns, data.invalid)
        formatter = self._formatter(name, columns)
        key = (self.run.train.seed, number) if data.shuffle else None
        read = partial(read_examples, formatter=formatter, refuse=refuse)
        files = tuple(DataFile(path, path.stat().st_size, "") for path in paths)
        report = SourceReport(
            "data.train", source.path, name, None, source.weight, Counts(), {}, (), files, source.license
        )  # fmt: skip
        size = sum(file.bytes for file in files)
        note = f"data.train {source.path}: {name} ({how}), streamed from {len(files):,} files of {size / 1e9:,.3g} GB"
        return StreamedSource(tuple(paths), read, source.weight, key, refuse), report, note

    def _formatter(self, name: str, columns: Mapping[str, str]) -> Formatter:
        pretrain = self.run.objective == "pretrain"
        return make_formatter(
            name, self.tokenizer, columns, self.config.vocab_size, pretrain=pretrain, template=self.template
        )

    def open(self, source: DataSource, key: str, number: int) -> "Opened":
        """The `number`-th source of a key: which files it has, which format. All processes call it, and raise alike."""
        data = self.run.data
        columns = data.columns if source.columns is None else source.columns
        named = key if isinstance(getattr(data, key.removeprefix("data.")), str) else f"{key} {source.path}"

        def look() -> Opened:
            paths = data_files(source.path)
            name, how, first = _format(source.format or data.format, paths, columns, data.invalid)
            formatter, sizes = self._formatter(name, columns), tuple(path.stat().st_size for path in paths)
            used = self.template if uses_template(name, first, columns) else None
            return Opened(source, key, named, tuple(paths), sizes, formatter, how, used, Turned(self.peers, number))

        found = attempt(look)
        seen = found if isinstance(found, LlmtuneError) else found.seen
        require_same_files(seen, self.peers, named)
        assert isinstance(found, Opened)
        return found

    def read(self, own: "Opened", tick: Tick) -> Found | LlmtuneError:
        """This process's part of a source; what ends the reading is returned, so that all processes hear of it."""
        data, skipped = self.run.data, Skipped()
        refuse = skipped if data.invalid == "skip" else stop
        index, count = own.peers.index, own.peers.count

        def work() -> Found:
            with ThreadPoolExecutor(1) as beside:
                hashed = beside.submit(read_identity, own.paths[index::count])
                rows = read_rows(list(share_of(own.paths, own.sizes, index, count)), refuse)
                examples = _ticking(read_examples(rows, own.formatter, refuse), tick)
                return Found(fit(examples, data.sequence_length, data.too_long), skipped, tuple(hashed.result()))

        return attempt(work)

    def join(self, own: "Opened", share: Found | LlmtuneError) -> tuple[Dataset, SourceReport, str]:
        """(examples, account, a line that says it) of what all have read. Raises LlmtuneError for what cannot be used."""
        data, source, named = self.run.data, own.source, own.named
        found = pool(share, own.peers, own.paths)
        dataset, skipped = found.dataset, found.skipped
        try:
            require_examples(dataset, data.sequence_length, named)
        except LlmtuneDataError as error:
            raise LlmtuneDataError(f"{error}; {skipped.describe()}" if skipped.total else str(error)) from None
        skipped.require_few(dataset.counts.rows, data.max_skipped, named)
        dataset.counts.rows += skipped.total
        report = SourceReport(
            own.key,
            source.path,
            own.formatter.name,
            own.template.name if own.template else None,
            source.weight,
            replace(dataset.counts),
            dict(skipped.reasons),
            tuple(skipped.first),
            found.files,
            source.license,
        )
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        through = f", chat template {own.template.name}" if own.template else ""
        note = f"{named}: {own.formatter.name} ({own.how}){through}{weight}, {dataset.counts.describe()}"
        return (
            dataset,
            report,
            f"{note}, {skipped.describe()}; the first: {skipped.first[0]}" if skipped.total else note,
        )

    def load(self, sources: Sequence[DataSource], key: str, tick: Tick) -> list[tuple[Dataset, SourceReport, str]]:
        """All sources of a key: opened together, each process reading its part of all of them, then put together."""
        opened = [self.open(source, key, number) for number, source in enumerate(sources)]
        shares: list[Found | LlmtuneError] = []
        for own in opened:
            shares.append(self.read(own, tick))
            if isinstance(shares[-1], LlmtuneError):
                break  # where its turn comes to be joined it is raised, in all processes
        return [self.join(own, share) for own, share in zip(opened, shares, strict=False)]


@dataclass(frozen=True)
class Opened:
    """A source whose files all processes see alike. `template`: the chat template that its rows are rendered with."""

    source: DataSource
    key: str
    named: str
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    formatter: Formatter
    how: str
    template: ChatTemplate | None
    peers: Peers

    @property
    def seen(self) -> list[tuple[str, int]]:
        """Names and sizes of its files."""
        return [(path.name, size) for path, size in zip(self.paths, self.sizes, strict=True)]


def _format(asked: str, paths: Sequence[Path], columns: Mapping[str, str], invalid: str) -> tuple[str, str, Row | None]:
    """(format, how it is known, a first row): with `auto`, the first row that has a known format's columns decides."""
    skip = invalid == "skip"
    rows = itertools.islice(read_rows(paths, Skipped() if skip else stop), TRIED)
    if asked != "auto":
        return asked, "as configured", next(rows, None)
    first: BadRow | None = None
    for row in rows:
        try:
            name = detect_format(row, columns)
        except BadRow as error:
            if not skip:
                raise
            first = first or error
            continue
        spelled = " and ".join(columns.get(own, own) for own in COLUMNS[name])
        return name, f"detected by {spelled}", row
    raise first or LlmtuneDataError(f"{paths[0]}: the file holds no rows")


def _ticking(examples: Iterable[Example], tick: Tick) -> Iterator[Example]:
    for example in examples:
        yield example
        tick(1)


def first_documents(source: StreamedSource, sequence_length: int) -> Dataset:
    """A few of them, for looking at; nothing is counted."""
    found = (example for example, _ in itertools.islice(source.documents(Cursor()), LOOKED_AT))
    return replace(collect(found, sequence_length, "truncate", name="data.train"), counts=Counts())
