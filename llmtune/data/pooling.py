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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar, final

import numpy as np

from llmtune.data.dataset import Counts, Dataset, concatenate
from llmtune.data.files import DataFile
from llmtune.data.invalid import SHOWN, Skipped
from llmtune.errors import LlmtuneDataError, LlmtuneError

Result = TypeVar("Result")


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


@final
@dataclass(frozen=True)
class Turned:
    """The same processes, beginning with another: what falls to the first alone falls to each in turn, source by source."""

    peers: Peers
    by: int

    @property
    def index(self) -> int:
        """Counted from the `by`-th."""
        return (self.peers.index - self.by) % self.peers.count

    @property
    def count(self) -> int:
        """As many."""
        return self.peers.count

    def gather(self, own: np.ndarray) -> list[np.ndarray]:
        """In the order of these indices."""
        first = self.by % self.peers.count
        found = self.peers.gather(own)
        return found[first:] + found[:first]


@dataclass(frozen=True)
class Found:
    """What was read of a source: examples (of a share there may be none), and rows that were left out.

    `files`: those that were hashed, of a share every `count`-th from the `index`-th.
    """

    dataset: Dataset
    skipped: Skipped
    files: tuple[DataFile, ...]


def attempt(work: Callable[[], Result]) -> Result | LlmtuneError:
    """What `work` gives, or what a user can mend about it: returned, so that all processes hear of it."""
    try:
        return work()
    except LlmtuneError as error:
        return error
    except OSError as error:
        return LlmtuneDataError(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def require_same_files(own: Sequence[tuple[str, int]] | LlmtuneError, peers: Peers, named: str) -> None:
    """Names and sizes of a source's files must be alike in all processes. What any of them cannot open is raised in all."""
    told = _tell(own, peers)
    for process, files in enumerate(told):
        if files != told[0]:
            other = next((pair for pair in zip(told[0], files, strict=False) if pair[0] != pair[1]), None)
            said = (
                f"{len(files):,} files where another sees {len(told[0]):,}"
                if other is None
                else f"{other[1][0]} with {other[1][1]:,} bytes where another sees {other[0][0]} with {other[0][1]:,}"
            )
            raise LlmtuneDataError(f"{named}: process {process} sees {said}; give all of them the same files")


def pool(own: Found | LlmtuneError, peers: Peers, paths: Sequence[Path]) -> Found:
    """All shares as one, as if one process had read them. What ended the reading of any process is raised in all."""
    told = _tell(own if isinstance(own, LlmtuneError) else _account(own), peers)
    assert isinstance(own, Found)  # else it was raised
    if peers.count == 1:
        return own
    dataset = own.dataset
    flat = np.concatenate([dataset.lengths.astype(np.int32), dataset.input_ids, dataset.labels])
    parts = [_dataset(values, Counts(**said["counts"])) for values, said in zip(peers.gather(flat), told, strict=True)]
    reasons = sum((Counter(said["reasons"]) for said in told), Counter())
    first = [where for said in told for where in said["first"]]
    files = [DataFile(path, *told[k % peers.count]["files"][k // peers.count]) for k, path in enumerate(paths)]
    return Found(concatenate(parts), Skipped(reasons, first[:SHOWN]), tuple(files))


def _account(own: Found) -> dict[str, object]:
    return {
        "counts": asdict(own.dataset.counts),
        "reasons": dict(own.skipped.reasons),
        "first": own.skipped.first,
        "files": [(file.bytes, file.sha256) for file in own.files],
    }


def _dataset(values: np.ndarray, counts: Counts) -> Dataset:
    lengths, ids, labels = np.split(values, [counts.examples, counts.examples + counts.tokens])
    return Dataset(ids, labels, np.cumsum([0, *lengths.tolist()]), counts)


def _tell(own: object, peers: Peers) -> list:
    """What each process says, as plain data. Where one of them says an error, the first of these is raised in all."""
    if peers.count == 1 and isinstance(own, LlmtuneError):
        raise own
    said = {"error": str(own)} if isinstance(own, LlmtuneError) else {"said": own}
    told = [json.loads(text.tobytes()) for text in peers.gather(np.frombuffer(json.dumps(said).encode(), np.uint8))]
    for process in told:
        if "error" in process:
            raise LlmtuneDataError(process["error"])
    return [process["said"] for process in told]
