"""Tiny random models made by transformers, one for each quirk that a published config has."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
)

torch.set_num_threads(2)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
MINISTRAL3 = {**YARN, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
SIZES = {
    "vocab_size": 199, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "head_dim": 8, "image_size": 32, "patch_size": 8,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
MODELS = {
    "gqa untied": (LlamaConfig, {}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "multi-head": (LlamaConfig, {"num_key_value_heads": 6}),
    "head_dim unlike hidden / heads": (LlamaConfig, {"head_dim": 14}),
    "llama3 scaling beyond the original length": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "linear scaling": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn scaling": (LlamaConfig, {"rope_parameters": YARN}),
    "yarn scaling, its optional fields": (LlamaConfig, {"rope_parameters": {
        **YARN, "mscale": 0.8, "mscale_all_dim": 0.4, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}}),
    "an eps that matters": (LlamaConfig, {"rms_norm_eps": 0.3}),
    "theta": (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "mistral with a window": (MistralConfig, {"sliding_window": 32, "head_dim": 16}),
    "ministral, interleaved windows": (MinistralConfig, {
        "sliding_window": 32, "head_dim": 16, "num_hidden_layers": 5, "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL]}),
    "ministral 3": (Ministral3Config, {"head_dim": 14, "tie_word_embeddings": True, "rope_parameters": MINISTRAL3}),
    "mistral 3, text tower": (Mistral3Config, {"head_dim": 16, "sliding_window": None}),
    "mixtral": (MixtralConfig, {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}),
    "mixtral with a window, one of three": (MixtralConfig, {
        "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 40, "tie_word_embeddings": True}),
}  # fmt: skip


def make_config(name: str, **more):
    """The configuration; that of a multimodal model holds the quirks in its text part."""
    kind, quirks = MODELS[name]
    fields = {**SIZES, **quirks, **more}
    if kind is not Mistral3Config:
        return kind(**fields)
    return kind(vision_config=VISION, text_config={"model_type": "mistral", **fields}, tie_word_embeddings=False)


def make_model(name: str, **more):
    """The model, in float32, every weight of a size at which mistakes show."""
    torch.manual_seed(sum(map(ord, name)))
    config = make_config(name, **more)
    auto = AutoModelForImageTextToText if isinstance(config, Mistral3Config) else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.5 if "norm" in parameter_name else 0.15
            parameter.copy_(torch.randn_like(parameter) * spread + ("norm" in parameter_name))
    return model


def load_reference(directory: Path):
    """What transformers reads from a directory, in float32."""
    multimodal = "Mistral3ForConditionalGeneration" in (directory / "config.json").read_text()
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def save_model(name: str, directory: Path, *, dtype=torch.float32, max_shard_size: str = "5GB", **more) -> Path:
    """As transformers writes it."""
    make_model(name, **more).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
