"""Functions from weights to weights: selecting, adapting, partitioning, merging. Stands on `weights` only."""

from llmtune.transforms.lora import Factors, lora, lora_from
from llmtune.transforms.merge import merge
from llmtune.transforms.partition import adapters, combine, everything, partition
from llmtune.transforms.quantize import quantize
from llmtune.transforms.select import select, weights_by_path
from llmtune.transforms.transform import Params, Transform, build, chain, full, identity
from llmtune.transforms.vocabulary import resize_vocabulary, without_vocabulary_axis
from llmtune.transforms.whole import EMBEDDING, HEAD, given_whole, select_whole, train_whole

__all__ = [
    "EMBEDDING", "HEAD", "Factors", "Params", "Transform", "adapters", "build", "chain", "combine", "everything", "full",
    "given_whole", "identity", "lora", "lora_from", "merge", "partition", "quantize", "resize_vocabulary", "select",
    "select_whole", "train_whole", "weights_by_path", "without_vocabulary_axis",
]  # fmt: skip
