"""All examples of a data set, tokenised once into flat arrays, with a count of what became of the rows."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from llmtune.data.example import IGNORED, Example
from llmtune.data.mixture import Mixture
from llmtune.errors import LlmtuneDataError

NOTHING = np.zeros(0, np.int32)  # what a share of rows begins with, which may hold no example


@dataclass
class Counts:
    """What was read: rows of the files, what was cut or left out, and what is left to train on."""

    rows: int = 0
    examples: int = 0
    split: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    targets: int = 0

    def describe(self) -> str:
        """`7,473 rows, 1.2M tokens (0.8M targets), 12 truncated`."""
        notes = [f"{getattr(self, name):,} {name}" for name in ("split", "truncated", "dropped") if getattr(self, name)]
        parts = [f"{self.rows:,} rows", f"{self.tokens:,} tokens ({self.targets:,} targets)", *notes]
        return ", ".join(parts)


@dataclass(frozen=True)
class Dataset:
    """Example i is `input_ids[offsets[i]:offsets[i + 1]]` with `labels` alike, both int32.

    `mixture` says how often an epoch has each example; None: once. `sizes`: examples of each source; sources lie one after
    the other; () where nobody asked whose is whose.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    counts: Counts
    mixture: Mixture | None = None
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.offsets)

    def source(self, index: int) -> int:
        """Which source an example is of."""
        return int(np.searchsorted(np.cumsum(self.sizes), index, side="right"))

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of one example."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[span], self.labels[span]


def collect(examples: Iterable[Example], sequence_length: int, too_long: str, *, name: str) -> Dataset:
    """Examples that fit the sequence length (see `fit`). Raises LlmtuneDataError where none are left."""
    return require_examples(fit(examples, sequence_length, too_long), sequence_length, name)


def fit(examples: Iterable[Example], sequence_length: int, too_long: str) -> Dataset:
    """Fit examples to the sequence length: text is split without loss, other rows are cut, left out or refused.

    A conversation is cut after the last answer that is whole; one whose first answer does not fit is cut at the limit.
    """
    counts, ids, labels = Counts(), [NOTHING], [NOTHING]
    for example in examples:
        counts.rows += 1
        for part in _fit(example, sequence_length, too_long, counts):
            ids.append(part.input_ids)
            labels.append(part.labels)
            counts.targets += int(np.count_nonzero(part.labels[1:] != IGNORED))
    counts.examples = len(ids) - 1
    counts.tokens = sum(map(len, ids))
    return Dataset(np.concatenate(ids), np.concatenate(labels), np.cumsum([*map(len, ids)]), counts)


def require_examples(dataset: Dataset, sequence_length: int, name: str) -> Dataset:
    """The same; raises LlmtuneDataError where there is none."""
    if not len(dataset):
        what = "every row was left out" if dataset.counts.rows else "there are no rows"
        raise LlmtuneDataError(f"{name}: nothing to train on: {what} (data.sequence_length {sequence_length})")
    return dataset


def join(datasets: Sequence[Dataset], mixture: Mixture | None) -> Dataset:
    """Sources one after the other, which are known apart."""
    if len(datasets) == 1 and mixture is None:
        return datasets[0]
    return replace(concatenate(datasets), mixture=mixture, sizes=tuple(map(len, datasets)))


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """Parts one after the other, with the sums of their counts."""
    counts = Counts(*(sum(getattr(own.counts, entry.name) for own in parts) for entry in fields(Counts)))
    offsets = np.cumsum([0, *itertools.chain.from_iterable(own.lengths.tolist() for own in parts)])
    ids, labels = (np.concatenate([getattr(own, name) for own in parts]) for name in ("input_ids", "labels"))
    return Dataset(ids, labels, offsets, counts)


def _fit(example: Example, limit: int, too_long: str, counts: Counts) -> Iterator[Example]:
    length = len(example.input_ids)
    if length <= limit:
        yield example
    elif example.cut == "pieces":
        counts.split += 1
        for start in range(0, length - 1, limit):  # a last piece of one token would have no target
            yield _piece(example, start, start + limit)
    elif too_long == "error":
        raise LlmtuneDataError(
            f"{example.where}: {length} tokens, data.sequence_length is {limit}; "
            "raise it, or set data.too_long to truncate or drop"
        )
    else:
        cut = _piece(example, 0, _end_of_turn(example, limit) if example.cut == "turn" else limit)
        if too_long == "drop" or not cut.has_targets:  # what was cut off were all its targets
            counts.dropped += 1
        else:
            counts.truncated += 1
            yield cut


def _end_of_turn(example: Example, limit: int) -> int:
    """After the last of the assistant's turns that is whole within the limit; the limit where not even one is."""
    targets = example.labels[: limit + 1] != IGNORED
    ends = np.flatnonzero(targets[:-1] & ~targets[1:])
    return int(ends[-1]) + 1 if len(ends) else limit


def _piece(example: Example, start: int, end: int) -> Example:
    return Example(example.input_ids[start:end], example.labels[start:end], example.where)
