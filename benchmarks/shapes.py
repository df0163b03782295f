"""Random Llamas (and a Mixtral) of given shapes, as Hugging Face directories that both sides load."""

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "25m": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
                "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
               "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
               "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "mixtral-4": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
               "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 8,
               "num_experts_per_tok": 2},  # 4 of the 32 layers of Mixtral 8x7B
}  # fmt: skip


def hf_settings(shape: str, dtype: str) -> dict[str, Any]:
    """config.json of a model of that shape."""
    sparse = "num_local_experts" in SHAPES[shape]
    return {
        "architectures": ["MixtralForCausalLM" if sparse else "LlamaForCausalLM"],
        "model_type": "mixtral" if sparse else "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0 if shape == "25m" else 500000.0, "max_position_embeddings": 8192, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": shape == "1b", "attention_bias": False, "mlp_bias": False,
        "initializer_range": 0.02, "torch_dtype": dtype, **SHAPES[shape],
        **({"output_router_logits": True} if sparse else {}),
    }  # fmt: skip


def write_model(directory: Path, shape: str, dtype: str) -> Path:
    """A Hugging Face directory with random weights, made by transformers once and kept."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (directory / "model.safetensors").exists() and not (directory / "model.safetensors.index.json").exists():
        torch.manual_seed(0)
        settings = hf_settings(shape, dtype)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.generation_config.eos_token_id = None  # generation runs to its full length
        model.save_pretrained(directory)
    return directory


def parameter_count(shape: str) -> int:
    """All weights, the tied head once."""
    s = SHAPES[shape]
    d, f, q = s["hidden_size"], s["intermediate_size"], s["num_attention_heads"] * s["head_dim"]
    kv = s["num_key_value_heads"] * s["head_dim"]
    experts = s.get("num_local_experts", 1)
    layer = 2 * d * q + 2 * d * kv + experts * 3 * d * f + 2 * d + (d * experts if experts > 1 else 0)
    return s["num_hidden_layers"] * layer + s["vocab_size"] * d * (1 if shape == "1b" else 2) + d


def active_parameters(shape: str) -> int:
    """Those that a token is multiplied with: of the experts its own, of the tables the head."""
    s = SHAPES[shape]
    unused = s.get("num_local_experts", 1) - s.get("num_experts_per_tok", 1)
    experts = s["num_hidden_layers"] * unused * 3 * s["hidden_size"] * s["intermediate_size"]
    table = 0 if shape == "1b" else s["vocab_size"] * s["hidden_size"]
    return parameter_count(shape) - experts - table
