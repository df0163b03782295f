"""Functions from weights to weights: selecting, adapting, partitioning, merging. Stands on `weights` only."""

from llmtune.transforms.lora import Factors, lora, lora_from
from llmtune.transforms.merge import merge
from llmtune.transforms.partition import adapters, combine, everything, partition
from llmtune.transforms.select import select, weights_by_path
from llmtune.transforms.transform import Params, Transform, chain, identity

__all__ = [
    "Factors", "Params", "Transform", "adapters", "chain", "combine", "everything", "identity", "lora", "lora_from",
    "merge", "partition", "select", "weights_by_path",
]  # fmt: skip
