"""Functions from weights to weights: selecting, adapting, partitioning, merging. Stands on `weights` only."""

from llmtune.transforms.arithmetic import COMBINATIONS, change_rank, combine_adapters
from llmtune.transforms.bank import bank_of, choose_rows
from llmtune.transforms.bottleneck import parallel_adapters, parallel_from, sequential_adapters, sequential_from
from llmtune.transforms.fusion import fusion_from, fusion_of
from llmtune.transforms.ia3 import Gains, ia3, ia3_from
from llmtune.transforms.initial import INITIAL, olora, pissa
from llmtune.transforms.loftq import loftq
from llmtune.transforms.lora import Factors, Toward, dora, lora, lora_from
from llmtune.transforms.low_rank import NOISE, LowRank, gaussian, kaiming
from llmtune.transforms.merge import merge, not_mergeable, refuse_without_dense, without_adapters
from llmtune.transforms.partition import adapters, combine, everything, partition
from llmtune.transforms.quantize import quantize, quantize_each
from llmtune.transforms.select import EMBEDDING, HEAD, select, weights_by_path
from llmtune.transforms.slots import fill, slots
from llmtune.transforms.transform import Params, Transform, build, chain, full, identity
from llmtune.transforms.vera import Projections, Vectors, vera, vera_from
from llmtune.transforms.virtual import p_tuning, prefix_from, prefix_tuning, prompt_from, prompt_tuning
from llmtune.transforms.vocabulary import resize_vocabulary, without_vocabulary_axis
from llmtune.transforms.whole import given_whole, select_whole, train_whole

__all__ = [
    "COMBINATIONS", "EMBEDDING", "HEAD", "INITIAL", "NOISE", "Factors", "Gains", "LowRank", "Params", "Projections", "Toward",
    "Transform", "Vectors", "adapters", "bank_of", "build", "chain", "change_rank", "choose_rows", "combine", "combine_adapters",
    "dora", "everything", "fill", "full", "fusion_from", "fusion_of", "gaussian", "given_whole", "ia3", "ia3_from", "identity",
    "kaiming", "loftq", "lora", "lora_from", "merge", "not_mergeable", "olora", "p_tuning", "parallel_adapters",
    "parallel_from", "partition", "pissa", "prefix_from", "prefix_tuning", "prompt_from", "prompt_tuning",
    "quantize", "quantize_each", "refuse_without_dense", "resize_vocabulary", "select", "select_whole", "sequential_adapters",
    "sequential_from", "slots", "train_whole", "vera", "vera_from", "weights_by_path", "without_adapters",
    "without_vocabulary_axis",
]  # fmt: skip
