"""Weights: arrays or operators, and the four doors through which models touch them. Stands on `sharding` only."""

from collections.abc import Callable

from llmtune.weights.adapters import LowRankValues, beneath, is_adapter, low_rank_values
from llmtune.weights.bank import Bank
from llmtune.weights.bottleneck import Bottleneck, Branch, Parallel
from llmtune.weights.doors import Weight, add_bias, embed_lookup, expert_linear, linear, unembed
from llmtune.weights.dora import DoRA, measured
from llmtune.weights.dropout import with_dropout_keys
from llmtune.weights.fusion import Fusion
from llmtune.weights.head_loss import head_loss
from llmtune.weights.ia3 import IA3
from llmtune.weights.int4 import Int4
from llmtune.weights.layers import join_shared, layer, map_stacked, split_shared
from llmtune.weights.lora import LoRA
from llmtune.weights.materialized import dense
from llmtune.weights.nf4 import NF4
from llmtune.weights.noisy import Noisy, with_noise
from llmtune.weights.operator import Adapter, Node, Operator, is_operator, map_fields, without_dense
from llmtune.weights.per_channel import Float8, Int8
from llmtune.weights.quantized import Quantized, has_codes, on_another_base
from llmtune.weights.recurrent_prompt import Recurrence, RecurrentPrompt
from llmtune.weights.spec import ArraySpec, Initializer, constant, materialize, normal, path_name, shardings, uniform
from llmtune.weights.tied import Tied
from llmtune.weights.vera import VeRA
from llmtune.weights.virtual import EncodedPrompt, Prefix, Prompt, VirtualPrompt, places, put

FORMATS: dict[str, Callable[[ArraySpec], Quantized]] = {
    "nf4": NF4.declare,
    "int4": Int4.declare,
    "int8": Int8.declare,
    "fp8": Float8.declare,
}  # quantised formats by the names that configurations use: the declaration of a matrix -> its fields, declared

__all__ = [
    "FORMATS",
    "IA3",
    "NF4",
    "Adapter",
    "ArraySpec",
    "Bank",
    "Bottleneck",
    "Branch",
    "DoRA",
    "EncodedPrompt",
    "Float8",
    "Fusion",
    "Initializer",
    "Int4",
    "Int8",
    "LoRA",
    "LowRankValues",
    "Node",
    "Noisy",
    "Operator",
    "Parallel",
    "Prefix",
    "Prompt",
    "Quantized",
    "Recurrence",
    "RecurrentPrompt",
    "Tied",
    "VeRA",
    "VirtualPrompt",
    "Weight",
    "add_bias",
    "beneath",
    "constant",
    "dense",
    "embed_lookup",
    "expert_linear",
    "has_codes",
    "head_loss",
    "is_adapter",
    "is_operator",
    "join_shared",
    "layer",
    "linear",
    "low_rank_values",
    "map_fields",
    "map_stacked",
    "materialize",
    "measured",
    "normal",
    "on_another_base",
    "path_name",
    "places",
    "put",
    "shardings",
    "split_shared",
    "unembed",
    "uniform",
    "with_dropout_keys",
    "with_noise",
    "without_dense",
]
