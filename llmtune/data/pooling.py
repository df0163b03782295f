"""What each process has read of a source, put together: all then know all of it, and each has read only its share.

    process 0   reads rows 0..3   ->  examples 0..3  \\
    process 1   reads rows 4..7   ->  examples 4..7   >  gather  ->  examples 0..11, on every process
    process 2   reads rows 8..11  ->  examples 8..11 /

Which examples a row of a batch holds is planned over the whole epoch, so every process needs all lengths, and, from one epoch
to the next, other examples. What is slow is the reading, parsing and tokenising; token ids then travel between the processes
as fast as gradients do.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, final

import numpy as np

from llmtune.data.dataset import Counts, Dataset, concatenate
from llmtune.data.files import DataFile, read_identity
from llmtune.data.invalid import SHOWN, Skipped
from llmtune.errors import LlmtuneDataError


class Peers(Protocol):
    """The processes of a run: `count` of them, of which this is the one with that index."""

    @property
    def index(self) -> int:
        """From 0."""
        ...

    @property
    def count(self) -> int:
        """At least 1."""
        ...

    def gather(self, own: np.ndarray) -> list[np.ndarray]:
        """What each has given, in order: arrays of one axis and one dtype, of any length. All must call it together."""
        ...


@final
@dataclass(frozen=True)
class Alone:
    """One process."""

    index: int = 0
    count: int = 1

    def gather(self, own: np.ndarray) -> list[np.ndarray]:
        """The same."""
        return [own]


@dataclass(frozen=True)
class Found:
    """What was read of a source: examples (of a share there may be none), and rows that were left out."""

    dataset: Dataset
    skipped: Skipped


def pool(own: Found | LlmtuneDataError, peers: Peers) -> Found:
    """All shares as one, as if one process had read them. What ended the reading of any process is raised in all."""
    if isinstance(own, LlmtuneDataError):
        said = {"error": str(own)}
    else:
        skipped = own.skipped
        said = {"counts": asdict(own.dataset.counts), "reasons": dict(skipped.reasons), "first": skipped.first}
    told = _gather_json(said, peers)
    for process in told:
        if "error" in process:
            raise LlmtuneDataError(process["error"])
    assert isinstance(own, Found)
    if peers.count == 1:
        return own
    dataset = own.dataset
    flat = np.concatenate([dataset.lengths.astype(np.int32), dataset.input_ids, dataset.labels])
    parts = [
        _dataset(values, Counts(**process["counts"])) for values, process in zip(peers.gather(flat), told, strict=True)
    ]
    reasons = sum((Counter(process["reasons"]) for process in told), Counter())
    first = [where for process in told for where in process["first"]]
    return Found(concatenate(parts), Skipped(reasons, first[:SHOWN]))


def pooled_identity(paths: Sequence[Path], peers: Peers) -> list[DataFile]:
    """Size and sha256 of each file; a file is read by one process."""
    own = read_identity(paths[peers.index :: peers.count])
    told = _gather_json([(file.bytes, file.sha256) for file in own], peers)
    return [DataFile(path, *told[k % peers.count][k // peers.count]) for k, path in enumerate(paths)]


def _dataset(values: np.ndarray, counts: Counts) -> Dataset:
    lengths, ids, labels = np.split(values, [counts.examples, counts.examples + counts.tokens])
    return Dataset(ids, labels, np.cumsum([0, *lengths.tolist()]), counts)


def _gather_json(value: object, peers: Peers) -> list:
    gathered = peers.gather(np.frombuffer(json.dumps(value).encode(), np.uint8))
    return [json.loads(text.tobytes()) for text in gathered]
