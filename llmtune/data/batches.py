"""Batches as a pure function of the step: (data set, plan, step) -> int32 [batch, sequence_length] arrays.

tokens        ids, 0 on padding (padding is known by segment_ids, never by id)
labels        aligned with tokens; -100 where there is no loss, and on the first token of each document
segment_ids   0 on padding, 1.. for the documents of a row
positions     index within the document
source_ids    of a mixture of several sources: which one a token is of, 0 on padding too
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from llmtune.data.dataset import Dataset
from llmtune.data.epochs import Epochs
from llmtune.data.example import IGNORED
from llmtune.data.packing import plan_epoch

HostBatch = dict[str, np.ndarray]
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclass(frozen=True)
class BatchSource:
    """Random access by step; a host gets its `share` of each global batch: these of its rows (None: all)."""

    dataset: Dataset
    batch_size: int
    sequence_length: int
    seed: int
    packing: bool
    shuffle: bool
    steps: int
    share: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> HostBatch:
        first, share = index * self.batch_size, range(self.batch_size) if self.share is None else self.share
        return assemble([self._row(first + k) for k in share], self.dataset, self.sequence_length)

    def _row(self, index: int) -> np.ndarray:
        """The examples of global row `index`; epochs follow each other without a gap."""
        plan, row = self._epochs.row(index)
        return plan.row(row)

    @functools.cached_property
    def _epochs(self) -> Epochs:
        return Epochs(
            lambda epoch: plan_epoch(
                self.dataset.lengths,
                self.sequence_length,
                seed=self.seed,
                epoch=epoch,
                packing=self.packing,
                shuffle=self.shuffle,
                mixture=self.dataset.mixture,
            )
        )

    def epoch(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return self._epochs.passed(step * self.batch_size)

    def rows_in(self, epochs: float) -> int:
        """Rows of that many epochs, rounded up."""
        whole = int(epochs)
        before = self._epochs.rows_before(whole)
        if epochs == whole:
            return before
        return before + int(np.ceil((epochs - whole) * (self._epochs.rows_before(whole + 1) - before)))


def assemble(rows: list[np.ndarray], dataset: Dataset, sequence_length: int) -> HostBatch:
    """Fill rows with the examples they were planned to hold; an empty list of examples is a row of padding."""
    shape = (len(rows), sequence_length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["labels"] = np.full(shape, IGNORED, np.int32)
    if len(dataset.sizes) > 1:
        batch["source_ids"] = np.zeros(shape, np.int32)
    for r, examples in enumerate(rows):
        at = 0
        for segment, example in enumerate(examples.tolist(), 1):
            ids, labels = dataset.example(example)
            span = slice(at, at + len(ids))
            batch["tokens"][r, span] = ids
            batch["labels"][r, span] = labels
            batch["labels"][r, at] = IGNORED
            batch["segment_ids"][r, span] = segment
            batch["positions"][r, span] = np.arange(len(ids))
            if len(dataset.sizes) > 1:
                batch["source_ids"][r, span] = dataset.source(example)
            at += len(ids)
    return batch


def read_batches(source: BatchSource, start: int) -> Iterator[HostBatch]:
    """Batches from step `start` to the last, read ahead on threads."""
    batches = grain.MapDataset.source(source)[start:]
    return iter(batches.to_iter_dataset(READ_AHEAD))


def evaluation_batches(
    dataset: Dataset, batch_size: int, sequence_length: int, limit: int | None, *, packing: bool = True
) -> list[HostBatch]:
    """Every example exactly once; the last batch is filled up with padding. `limit`: at most so many batches."""
    plan = plan_epoch(dataset.lengths, sequence_length, seed=0, epoch=0, packing=packing, shuffle=False)
    rows = [plan.row(r) for r in range(len(plan))]
    rows += [np.zeros(0, np.int64)] * (-len(rows) % batch_size)
    groups = [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]
    return [assemble(group, dataset, sequence_length) for group in groups[:limit]]
