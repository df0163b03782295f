"""Prompt tuning, P-tuning and prefix tuning in PEFT directories: one tensor, `prompt_embeddings`.

    PROMPT_TUNING, P_TUNING   [n, hidden]                      what stands before the embeddings of the tokens
    PREFIX_TUNING             [n, L * 2 * kv_heads * size]     of each layer keys, then values   ->   k, v [L, n, kv_heads * size]

The network that made the vectors (P-tuning's encoder, a prefix's projection) is not among what peft stores.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_convert.peft.directory import PeftDirectory
from checkpoints_convert.peft.whole import whole_name
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

KEY = "prompt_embeddings"
READ = {
    "num_virtual_tokens",
    "token_dim",
    "num_attention_heads",
    "num_layers",
}  # each follows from the tensor and the base
HARMLESS = {  # they say how the vectors came to be
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "prefix_projection",
}  # fmt: skip
REFUSED = {"num_transformer_submodules": (1, None)}


@dataclass(frozen=True)
class Prompt:
    """float32 [n, hidden]."""

    table: np.ndarray


@dataclass(frozen=True)
class Prefix:
    """float32 [L, n, kv_heads * head_dim]: keys and values as attention sees them."""

    k: np.ndarray
    v: np.ndarray


def read_prompt(directory: PeftDirectory, config: ModelConfig) -> Prompt | None:
    """The vectors of a prompt, however they were made."""
    vectors = _vectors(directory, config.hidden_size)
    return None if vectors is None else Prompt(vectors)


def read_prefix(directory: PeftDirectory, config: ModelConfig) -> Prefix | None:
    """The keys and values of a prefix, layer by layer."""
    layers, width = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    vectors = _vectors(directory, layers * 2 * width)
    if vectors is None:
        return None
    k, v = vectors.reshape(len(vectors), layers, 2, width).transpose(2, 1, 0, 3)
    return Prefix(k, v)


def write_prompt(values: Prompt, config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Of PROMPT_TUNING."""
    settings = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    return _write(values.table, config, config.hidden_size, config.num_attention_heads, settings)


def write_p_tuning(values: Prompt, config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Of P_TUNING."""
    settings = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": config.hidden_size}
    return _write(values.table, config, config.hidden_size, config.num_attention_heads, settings)


def write_prefix(values: Prefix, config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Of PREFIX_TUNING; peft counts key heads there, and calls their joint width the token's."""
    layers, number, width = values.k.shape
    vectors = np.stack([values.k, values.v]).transpose(2, 1, 0, 3).reshape(number, layers * 2 * width)
    settings = {"prefix_projection": False, "encoder_hidden_size": width}
    return _write(vectors, config, width, config.num_key_value_heads, settings)


def _vectors(directory: PeftDirectory, width: int) -> np.ndarray | None:
    directory.check_fields(READ, HARMLESS, REFUSED)
    weights = directory.weights
    for key, info in weights.tensors.items():
        if key != KEY and whole_name(key) is None:
            raise LlmtuneFormatError(f"{info.file}: {key} is no {KEY}, which is all that such an adapter holds")
    if KEY not in weights.tensors:
        return None
    vectors = weights.read(KEY).astype(np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors):
        raise LlmtuneFormatError(
            f"{weights.path}: {KEY} is {list(vectors.shape)} where this base needs [virtual tokens, {width}]; "
            "the adapter was made for another base model"
        )
    if directory.settings.get("num_virtual_tokens", len(vectors)) != len(vectors):
        raise directory.refuse("num_virtual_tokens", f"its tensor has {len(vectors)}")
    return vectors


def _write(
    vectors: np.ndarray, config: ModelConfig, width: int, heads: int, settings: dict[str, Any]
) -> tuple[list[Entry], dict[str, Any]]:
    array = np.ascontiguousarray(vectors, dtype=np.float32)
    common = {
        "num_virtual_tokens": len(array),
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }
    return [Entry(KEY, array.dtype, array.shape, lambda: array)], {**common, **settings}
