"""config.json <-> ModelConfig: the only truth about a model, read strictly in both spellings.

transformers 4 writes `rope_theta`, `rope_scaling`, `torch_dtype`; transformers 5 writes `rope_parameters` and `dtype`. A field
that changes the mathematics and is not implemented is an error that names it; a field nobody here knows is one too, since it
might. Nothing is assumed from a model's name. Of a multimodal model, `text_config` is read.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_convert.hf_architectures import (
    ARCHITECTURES,
    MULTIMODAL,
    Architecture,
    architecture_of,
    experts_to_hf,
    parse_experts,
    parse_windows,
    supported_only,
    text_part,
    windows_to_hf,
)
from checkpoints_convert.hf_fields import flag, fraction, number, positive, short, token, wrong
from checkpoints_convert.hf_rope import parse_rope, rope_to_hf
from checkpoints_convert.safetensors_reader import read_json
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

GENERATION = "generation_config.json"

READ = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "max_position_embeddings", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id", "hidden_act", "sliding_window", "layer_types", "attention_bias", "attention_dropout",
    "mlp_bias",
    "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef", "torch_dtype", "dtype",
    "original_max_position_embeddings",
}  # fmt: skip
HARMLESS = {  # they say nothing about the function that the weights compute
    "transformers_version", "_name_or_path", "use_cache", "pretraining_tp", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "is_decoder", "finetuning_task", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "tokenizer_class", "prefix", "use_bfloat16", "tf_legacy_loss", "license", "model_max_length", "max_length",
    "min_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "_commit_hash",
    "unsloth_version", "unsloth_fixed", "output_router_logits",
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", None)
OUTSIDE = {  # of a multimodal model beside text_config: they are about images, or repeat what the text part says
    "text_config", "vision_config", "image_token_index", "image_token_id", "projector_hidden_act", "vision_feature_layer",
    "multimodal_projector_bias", "spatial_merge_size", "architectures", "model_type", "tie_word_embeddings", "torch_dtype",
    "dtype", "eos_token_id", "bos_token_id", "pad_token_id",
}  # fmt: skip
SUPPORTED = {  # each of these changes the mathematics; the one value that is implemented
    "partial_rotary_factor": (1.0, 1, None), "is_encoder_decoder": (False, None), "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,), "tie_encoder_decoder": (False, None), "pruned_heads": ({}, None),
    "qk_norm": (False, None), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "quantization_config": (None,), "auto_map": (None,), "use_qk_norm": (False, None), "num_experts": (None,),
    "router_jitter_noise": (0.0, 0, None), "hidden_dropout": (0.0, 0, None),
    "mup_enabled": (False, None),
}  # fmt: skip


def read_model_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. eos ids: generation_config.json's, else config.json's."""
    path = directory / "config.json"
    if not path.exists():
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) if directory.is_dir() else "no directory"
        raise LlmtuneFormatError(f"{directory}: no config.json there (found: {there or 'nothing'})")
    generation = directory / GENERATION
    return parse_model_config(read_json(path), read_json(generation) if generation.is_file() else None, str(path))


def parse_model_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str) -> ModelConfig:
    """See `read_model_config`; `where` is the file named in errors."""
    text = text_part(config, where)
    if text is config:
        return _parse_text(config, generation, where)
    outside = {name: value for name, value in config.items() if name not in OUTSIDE}
    misplaced = sorted(set(outside) & READ)
    if misplaced:
        raise wrong(where, misplaced[0], outside[misplaced[0]], "inside text_config")
    _refuse_unknown(outside, SUPPORTED, where)
    eos = {"eos_token_id": config["eos_token_id"]} if config.get("eos_token_id") is not None else {}
    return replace(_parse_text({**text, **eos}, generation, where), architecture=MULTIMODAL)


def _parse_text(config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str) -> ModelConfig:
    own = architecture_of(config, where)
    if config.get("hidden_act", "silu") != "silu":
        raise wrong(where, "hidden_act", config["hidden_act"], "silu")
    _refuse_unknown(config, SUPPORTED | supported_only(own), where)
    for name in ("dtype", "torch_dtype"):
        if config.get(name) not in DTYPES:
            raise wrong(where, name, config[name], "float32, bfloat16, float16 or null")
    hidden, heads, kv_heads, head_dim = _heads(config, own, where)
    layers = positive(config, "num_hidden_layers", where)
    return ModelConfig(
        architecture=own.name,
        vocab_size=positive(config, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=positive(config, "intermediate_size", where),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(config, "rms_norm_eps", where, own.eps),
        rope=parse_rope(config, where, own.theta, own.scales_queries),
        tie_word_embeddings=flag(config, "tie_word_embeddings", where),
        attention_dropout=fraction(config, "attention_dropout", where),
        attention_bias=own.biases and flag(config, "attention_bias", where),
        mlp_bias=own.biases and flag(config, "mlp_bias", where),
        windows=parse_windows(config, own, layers, where),
        experts=parse_experts(config, own, where),
        max_position_embeddings=positive(config, "max_position_embeddings", where, own.positions),
        initializer_range=number(config, "initializer_range", where, 0.02),
        bos_token_id=token(config, "bos_token_id", where),
        eos_token_ids=_eos(config, generation, where),
        pad_token_id=token(config, "pad_token_id", where),
    )


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A config.json in the older spelling, which transformers 4 and 5 and vLLM all read."""
    if config.is_text_tower:
        raise LlmtuneFormatError(f"{MULTIMODAL}: its config.json is written from that of its source, not from scratch")
    own, eos = ARCHITECTURES[config.architecture], list(config.eos_token_ids)
    return {
        "architectures": [own.name],
        "model_type": own.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        **rope_to_hf(config.rope),
        "tie_word_embeddings": config.tie_word_embeddings,
        **({"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias} if own.biases else {}),
        **({"attention_dropout": config.attention_dropout} if config.attention_dropout else {}),
        **windows_to_hf(config.windows, own, config.num_hidden_layers),
        **experts_to_hf(config.experts),
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    }


def _heads(config: Mapping[str, Any], own: Architecture, where: str) -> tuple[int, int, int, int]:
    """hidden_size, heads, key-value heads and head_dim, which must fit each other."""
    hidden = positive(config, "hidden_size", where)
    heads = positive(config, "num_attention_heads", where)
    absent = own.kv_heads if own.kv_heads is not None and "num_key_value_heads" not in config else heads
    kv_heads = positive(config, "num_key_value_heads", where, absent)
    derived = own.head_dim if own.head_dim is not None and "head_dim" not in config else hidden // heads
    if config.get("head_dim") is None and derived * heads != hidden and own.head_dim is None:
        raise wrong(where, "head_dim", None, f"a number: hidden_size {hidden} does not divide by {heads} heads")
    head_dim = positive(config, "head_dim", where, derived)
    if heads % kv_heads:
        raise wrong(where, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    if head_dim % 2:
        raise wrong(where, "head_dim", head_dim, "an even number (rotary embedding turns pairs)")
    return hidden, heads, kv_heads, head_dim


def _refuse_unknown(config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, value in config.items():
        if name in supported:
            if value not in supported[name]:
                raise wrong(where, name, value, f"{supported[name][0]!r}: anything else is not implemented")
        elif name not in READ and name not in HARMLESS:
            near = difflib.get_close_matches(name, READ, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise LlmtuneFormatError(
                f"{where}: unknown field {short(name)} ({short(value)}), which may change the mathematics; {hint}"
                "remove it if it does not"
            )


def _eos(config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str) -> tuple[int, ...]:
    value = (generation or {}).get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    else:
        where = str(Path(where).with_name(GENERATION))
    ids = [] if value is None else (value if isinstance(value, list) else [value])
    if not all(type(i) is int and i >= 0 for i in ids):
        raise wrong(where, "eos_token_id", value, "a token id or a list of them")
    return tuple(ids)
