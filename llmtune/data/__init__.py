"""From files of rows to batches of tokens: deterministic, resumable, packed by a plan."""

from llmtune.data.batches import BatchSource, HostBatch, evaluation_batches, read_batches
from llmtune.data.dataset import Counts, Dataset
from llmtune.data.run_data import RunData, added_tokens, load_data

__all__ = [
    "BatchSource",
    "Counts",
    "Dataset",
    "HostBatch",
    "RunData",
    "added_tokens",
    "evaluation_batches",
    "load_data",
    "read_batches",
]
