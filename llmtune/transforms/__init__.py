"""Functions from weights to weights: selecting, adapting, partitioning, merging. Stands on `weights` only."""

from llmtune.transforms.bank import bank_of, choose_rows
from llmtune.transforms.bottleneck import parallel_adapters, parallel_from, sequential_adapters, sequential_from
from llmtune.transforms.fusion import fusion_from, fusion_of
from llmtune.transforms.lora import Factors, lora, lora_from
from llmtune.transforms.merge import merge, not_mergeable, refuse_without_dense
from llmtune.transforms.partition import adapters, combine, everything, partition
from llmtune.transforms.select import select, weights_by_path
from llmtune.transforms.slots import fill, slots
from llmtune.transforms.transform import Params, Transform, build, chain, full, identity
from llmtune.transforms.virtual import p_tuning, prefix_from, prefix_tuning, prompt_from, prompt_tuning
from llmtune.transforms.vocabulary import resize_vocabulary, without_vocabulary_axis
from llmtune.transforms.whole import EMBEDDING, HEAD, given_whole, select_whole, train_whole

__all__ = [
    "EMBEDDING", "HEAD", "Factors", "Params", "Transform", "adapters", "bank_of", "build", "chain", "choose_rows", "combine",
    "everything", "fill", "full", "fusion_from", "fusion_of", "given_whole", "identity", "lora", "lora_from", "merge",
    "not_mergeable", "p_tuning", "parallel_adapters", "parallel_from", "partition", "prefix_from", "prefix_tuning", "prompt_from",
    "prompt_tuning", "refuse_without_dense", "resize_vocabulary", "select", "select_whole", "sequential_adapters",
    "sequential_from", "slots", "train_whole", "weights_by_path", "without_vocabulary_axis",
]  # fmt: skip
