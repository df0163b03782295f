"""From files of rows to batches of tokens: deterministic, resumable, packed by a plan."""

from llmtune.data.batches import BatchSource, HostBatch, evaluation_batches, read_batches
from llmtune.data.dataset import Counts, Dataset
from llmtune.data.feed import Feed
from llmtune.data.files import DataFile
from llmtune.data.first_row import Look
from llmtune.data.run_data import RunData, added_tokens, load_data
from llmtune.data.sources import SourceReport
from llmtune.data.stream import Position

__all__ = [
    "BatchSource",
    "Counts",
    "DataFile",
    "Dataset",
    "Feed",
    "HostBatch",
    "Look",
    "Position",
    "RunData",
    "SourceReport",
    "added_tokens",
    "evaluation_batches",
    "load_data",
    "read_batches",
]
