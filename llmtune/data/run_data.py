"""The data of a run: files found, format detected, rows tokenised."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.config import Run
from llmtune.data.batches import BatchSource
from llmtune.data.dataset import Dataset, collect
from llmtune.data.formats import Example, detect_format, make_formatter, read_examples
from llmtune.data.rows import data_files, files_digest, read_rows
from llmtune.errors import LlmtuneConfigError, LlmtuneDataError
from llmtune.models.config import ModelConfig
from llmtune.shipped import resolve
from llmtune.tokenizers import AddedTokens, Tokenizer, check_fits, load_tokenizer

Tick = Callable[[int], None]


@dataclass(frozen=True)
class RunData:
    """Training and held-out examples, and the sha256 of the files they came from."""

    train: Dataset
    validation: Dataset | None
    tokenizer: Tokenizer | None
    digest: str
    notes: tuple[str, ...]

    def source(self, run: Run, steps: int, process: int = 0, processes: int = 1) -> BatchSource:
        """The run's training batches."""
        return BatchSource(
            self.train,
            run.train.batch_size,
            run.data.sequence_length,
            run.train.seed,
            run.data.packing,
            run.data.shuffle,
            steps,
            process,
            processes,
        )

    def steps(self, run: Run) -> int:
        """Updates that the run asks for: `steps`, or as many as its epochs have batches."""
        if run.train.epochs is None:
            return 200 if run.train.steps is None else run.train.steps
        rows = self.source(run, steps=1).rows_in(run.train.epochs)
        return max(1, math.ceil(rows / run.train.batch_size))


def load_data(run: Run, config: ModelConfig, directory: Path | None, tick: Tick = lambda rows: None) -> RunData:
    """Read and tokenise everything; raises LlmtuneError with file:line for what cannot be used."""
    tokenizer_home = directory if run.data.tokenizer is None else resolve(run.data.tokenizer)
    tokenizer = None if tokenizer_home is None else load_tokenizer(tokenizer_home, added_tokens(run))
    if run.data.tokenizer is not None and tokenizer is None:
        raise LlmtuneDataError(f"data.tokenizer: {run.data.tokenizer} holds no tokenizer.json and no tokenizer.model")
    if tokenizer is not None:
        check_fits(tokenizer, config)

    elif run.evaluate.prompts:
        raise LlmtuneConfigError(
            "evaluate.prompts: the model has no tokenizer to read them; set data.tokenizer, or leave them out"
        )

    def load(names: str | Sequence[str], key: str) -> tuple[Dataset, str, str]:
        paths = data_files(names)
        examples, found = _examples(paths, run, tokenizer, config)
        dataset = collect(_counted(examples, tick), run.data.sequence_length, run.data.too_long, name=key)
        return dataset, files_digest(paths), f"{key}: {found}, {dataset.counts.describe()}"

    train, digest, train_note = load(run.data.train, "data.train")
    if not run.data.validation:
        return RunData(train, None, tokenizer, digest, (train_note,))
    validation, other, note = load(run.data.validation, "data.validation")
    both = hashlib.sha256(f"{digest} {other}".encode()).hexdigest()
    return RunData(train, validation, tokenizer, both, (train_note, note))


def added_tokens(run: Run) -> AddedTokens:
    """The tokens that a run adds to its tokenizer."""
    return AddedTokens(tuple(run.data.add_tokens), tuple(run.data.add_special_tokens))


def _examples(
    paths: Sequence[Path], run: Run, tokenizer: Tokenizer | None, config: ModelConfig
) -> tuple[Iterator[Example], str]:
    data, rows = run.data, read_rows(paths)
    first = next(rows, None)
    if first is None:
        raise LlmtuneDataError(f"{paths[0]}: the file holds no rows")
    found = detect_format(first, data.columns) if data.format == "auto" else data.format
    note = f"{found} (detected)" if data.format == "auto" else found
    formatter = make_formatter(found, tokenizer, data.columns, config.vocab_size, pretrain=run.objective == "pretrain")
    return read_examples(_again(first, rows), formatter), note


def _again(first: object, rest: Iterator) -> Iterator:
    yield first
    yield from rest


def _counted(examples: Iterable[Example], tick: Tick) -> Iterator[Example]:
    for example in examples:
        yield example
        tick(1)
