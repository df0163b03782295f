"""Weights: arrays or operators, and the four doors through which models touch them. Stands on `sharding` only."""

from llmtune.weights.bank import Bank
from llmtune.weights.bottleneck import Bottleneck, Branch, Parallel
from llmtune.weights.doors import Weight, add_bias, embed_lookup, expert_linear, head_loss, linear, unembed
from llmtune.weights.fusion import Fusion
from llmtune.weights.lora import LoRA
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Node, Operator, is_operator, map_fields, without_dense
from llmtune.weights.spec import ArraySpec, Initializer, constant, materialize, normal, path_name, shardings, uniform
from llmtune.weights.tied import Tied
from llmtune.weights.virtual import EncodedPrompt, Prefix, Prompt, VirtualPrompt, places, put

__all__ = [
    "ArraySpec",
    "Bank",
    "Bottleneck",
    "Branch",
    "EncodedPrompt",
    "Fusion",
    "Initializer",
    "LoRA",
    "Node",
    "Operator",
    "Parallel",
    "Prefix",
    "Prompt",
    "Tied",
    "VirtualPrompt",
    "Weight",
    "add_bias",
    "constant",
    "dense",
    "embed_lookup",
    "expert_linear",
    "head_loss",
    "is_operator",
    "linear",
    "map_fields",
    "materialize",
    "normal",
    "path_name",
    "places",
    "put",
    "shardings",
    "unembed",
    "uniform",
    "without_dense",
]
