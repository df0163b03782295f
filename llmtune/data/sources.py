"""One source of a mixture: files -> examples, with an account of what became of every row."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from llmtune.config import DataSource, Run
from llmtune.data.dataset import Counts, Dataset, collect, fit, require_examples
from llmtune.data.example import Example
from llmtune.data.files import DataFile, data_files
from llmtune.data.formats import COLUMNS, Formatter, detect_format, make_formatter, read_examples, uses_template
from llmtune.data.invalid import BadRow, Skipped, stop
from llmtune.data.pooling import Alone, Found, Peers, pool, pooled_identity
from llmtune.data.rows import Row, read_rows
from llmtune.data.spans import share_of
from llmtune.data.stream import Cursor, StreamedSource
from llmtune.errors import LlmtuneDataError
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

    def load(self, source: DataSource, key: str, tick: Tick) -> tuple[Dataset, SourceReport, str]:
        """(examples, account, a line that says it). Raises LlmtuneError with file:line for what cannot be used."""
        data, paths = self.run.data, data_files(source.path)
        columns = data.columns if source.columns is None else source.columns
        name, how, first = _format(source.format or data.format, paths, columns, data.invalid)
        formatter = self._formatter(name, columns)
        named = key if isinstance(getattr(data, key.removeprefix("data.")), str) else f"{key} {source.path}"
        found = pool(self._read_share(paths, formatter, tick), self.peers)
        dataset, skipped = found.dataset, found.skipped
        try:
            require_examples(dataset, data.sequence_length, named)
        except LlmtuneDataError as error:
            raise LlmtuneDataError(f"{error}; {skipped.describe()}" if skipped.total else str(error)) from None
        skipped.require_few(dataset.counts.rows, data.max_skipped, named)
        dataset.counts.rows += skipped.total
        used = self.template if uses_template(name, first, columns) else None
        report = SourceReport(
            key,
            source.path,
            name,
            used.name if used else None,
            source.weight,
            replace(dataset.counts),
            dict(skipped.reasons),
            tuple(skipped.first),
            tuple(pooled_identity(paths, self.peers)),
            source.license,
        )
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        through = f", chat template {used.name}" if used else ""
        note = f"{named}: {name} ({how}){through}{weight}, {dataset.counts.describe()}"
        return (
            dataset,
            report,
            f"{note}, {skipped.describe()}; the first: {skipped.first[0]}" if skipped.total else note,
        )

    def _read_share(self, paths: Sequence[Path], formatter: Formatter, tick: Tick) -> Found | LlmtuneDataError:
        """This process's part of the files; what ends the reading is returned, so that all processes hear of it."""
        data, skipped = self.run.data, Skipped()
        refuse = skipped if data.invalid == "skip" else stop
        rows = read_rows(list(share_of(paths, self.peers.index, self.peers.count)), refuse)
        try:
            examples = _ticking(read_examples(rows, formatter, refuse), tick)
            return Found(fit(examples, data.sequence_length, data.too_long), skipped)
        except LlmtuneDataError as error:
            return error


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
