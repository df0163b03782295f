"""Tiny random models made by transformers, one for each quirk that a published config has."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

torch.set_num_threads(2)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
SIZES = {
    "vocab_size": 199, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "gqa untied": (LlamaConfig, {}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "multi-head": (LlamaConfig, {"num_key_value_heads": 6}),
    "head_dim unlike hidden / heads": (LlamaConfig, {"head_dim": 14}),
    "llama3 scaling beyond the original length": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "an eps that matters": (LlamaConfig, {"rms_norm_eps": 0.3}),
    "theta": (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
}


def make_model(name: str, **more):
    """The model, in float32, every weight of a size at which mistakes show."""
    kind, quirks = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    config = kind(**{**SIZES, **quirks, **more})
    model = (LlamaForCausalLM if kind is LlamaConfig else MistralForCausalLM)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.5 if "norm" in parameter_name else 0.15
            parameter.copy_(torch.randn_like(parameter) * spread + ("norm" in parameter_name))
    return model


def save_model(name: str, directory: Path, *, dtype=torch.float32, max_shard_size: str = "5GB", **more) -> Path:
    """As transformers writes it."""
    make_model(name, **more).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
