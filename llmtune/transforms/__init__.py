"""Functions from weights to weights: selecting, adapting, partitioning, merging. Stands on `weights` only."""

from llmtune.transforms.arithmetic import COMBINATIONS, change_rank, combine_adapters
from llmtune.transforms.ia3 import Gains, ia3, ia3_from
from llmtune.transforms.initial import INITIAL, olora, pissa
from llmtune.transforms.loftq import loftq
from llmtune.transforms.lora import Factors, dora, lora, lora_from
from llmtune.transforms.low_rank import LowRank
from llmtune.transforms.merge import merge
from llmtune.transforms.partition import adapters, combine, everything, partition
from llmtune.transforms.quantize import quantize
from llmtune.transforms.select import EMBEDDING, HEAD, select, weights_by_path
from llmtune.transforms.transform import Params, Transform, build, chain, full, identity
from llmtune.transforms.vera import Projections, Vectors, vera, vera_from
from llmtune.transforms.vocabulary import resize_vocabulary, without_vocabulary_axis
from llmtune.transforms.whole import given_whole, select_whole, train_whole

__all__ = [
    "COMBINATIONS", "EMBEDDING", "HEAD", "INITIAL", "Factors", "Gains", "LowRank", "Params", "Projections", "Transform",
    "Vectors", "adapters", "build", "chain", "change_rank", "combine", "combine_adapters", "dora", "everything", "full",
    "given_whole", "ia3", "ia3_from", "identity", "loftq", "lora", "lora_from", "merge", "olora", "partition", "pissa",
    "quantize", "resize_vocabulary", "select", "select_whole", "train_whole", "vera", "vera_from", "weights_by_path",
    "without_vocabulary_axis",
]  # fmt: skip
