"""config.json <-> ModelConfig: the only truth about a model, read strictly in both spellings.

transformers 4 writes `rope_theta`, `rope_scaling`, `torch_dtype`; transformers 5 writes `rope_parameters` and `dtype`. A field
that changes the mathematics and is not implemented is an error that names it; a field nobody here knows is one too, since it
might. Nothing is assumed from a model's name.
"""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.safetensors_reader import read_json
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import Llama3Scaling, ModelConfig, Rope

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
GENERATION = "generation_config.json"

READ = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "max_position_embeddings", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id", "hidden_act", "sliding_window", "torch_dtype", "dtype",
}  # fmt: skip
HARMLESS = {  # they say nothing about the function that the weights compute
    "transformers_version", "_name_or_path", "use_cache", "pretraining_tp", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "attention_dropout", "hidden_dropout", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "is_decoder", "finetuning_task", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "tokenizer_class", "prefix", "use_bfloat16", "tf_legacy_loss", "license", "model_max_length", "max_length",
    "min_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "_commit_hash",
    "unsloth_version", "unsloth_fixed", "original_max_position_embeddings", "mup_enabled",
}  # fmt: skip
SUPPORTED = {  # each of these changes the mathematics; the one value that is implemented
    "attention_bias": (False, None), "mlp_bias": (False, None), "partial_rotary_factor": (1.0, 1, None),
    "is_encoder_decoder": (False, None), "add_cross_attention": (False, None), "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None), "pruned_heads": ({}, None), "layer_types": (None,), "qk_norm": (False, None),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "quantization_config": (None,),
    "auto_map": (None,), "use_qk_norm": (False, None), "num_experts": (None,), "num_local_experts": (None,),
}  # fmt: skip


def read_model_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. eos ids: generation_config.json's, else config.json's."""
    path = directory / "config.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) if directory.is_dir() else "no directory"
        raise LlmtuneFormatError(f"{directory}: no config.json there (found: {there or 'nothing'})")
    generation = directory / GENERATION
    return parse_model_config(read_json(path), read_json(generation) if generation.is_file() else None, str(path))


def parse_model_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str) -> ModelConfig:
    """See `read_model_config`; `where` is the file named in errors."""
    architecture = _architecture(config, where)
    _refuse_unknown(config, where)
    hidden = _positive(config, "hidden_size", where)
    heads = _positive(config, "num_attention_heads", where)
    absent = 8 if architecture == "MistralForCausalLM" and "num_key_value_heads" not in config else heads
    kv_heads = _positive(config, "num_key_value_heads", where, absent)
    if config.get("head_dim") is None and hidden % heads:
        raise _wrong(where, "head_dim", None, f"a number: hidden_size {hidden} does not divide by {heads} heads")
    head_dim = _positive(config, "head_dim", where, hidden // heads)
    if heads % kv_heads:
        raise _wrong(where, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    if head_dim % 2:
        raise _wrong(where, "head_dim", head_dim, "an even number (rotary embedding turns pairs)")
    positions = _positive(
        config, "max_position_embeddings", where, 2048 if architecture == "LlamaForCausalLM" else 131072
    )
    if architecture == "MistralForCausalLM":
        _refuse_window(config, positions, where)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive(config, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size", where),
        num_hidden_layers=_positive(config, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        rope=_rope(config, where),
        tie_word_embeddings=_flag(config, "tie_word_embeddings", where),
        max_position_embeddings=positions,
        initializer_range=_number(config, "initializer_range", where, 0.02),
        bos_token_id=_token(config, "bos_token_id", where),
        eos_token_ids=_eos(config, generation, where),
        pad_token_id=_token(config, "pad_token_id", where),
    )


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A config.json in the older spelling, which transformers 4 and 5 and vLLM all read."""
    scaling = config.rope.scaling
    eos = list(config.eos_token_ids)
    result: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": next(kind for kind, name in MODEL_TYPES.items() if name == config.architecture),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **vars(scaling)},
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    }
    if config.architecture == "MistralForCausalLM":
        result["sliding_window"] = None
    return result


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures") or [MODEL_TYPES.get(str(config.get("model_type")), config.get("model_type"))]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise _wrong(where, "architectures", names, f"one of {', '.join(ARCHITECTURES)}")
    kind = config.get("model_type")
    if kind is not None and MODEL_TYPES.get(str(kind)) != names[0]:
        raise _wrong(where, "model_type", kind, f"that of {names[0]}")
    if config.get("hidden_act", "silu") != "silu":
        raise _wrong(where, "hidden_act", config["hidden_act"], "silu")
    return names[0]


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    for name, value in config.items():
        if name in SUPPORTED:
            if value not in SUPPORTED[name]:
                raise _wrong(where, name, value, f"{SUPPORTED[name][0]!r}: anything else is not implemented")
        elif name not in READ and name not in HARMLESS:
            near = difflib.get_close_matches(name, READ, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise LlmtuneFormatError(
                f"{where}: unknown field {_short(name)} ({_short(value)}), which may change the mathematics; {hint}"
                "remove it if it does not"
            )


def _refuse_window(config: Mapping[str, Any], positions: int, where: str) -> None:
    window = config.get("sliding_window", 4096)  # transformers' default where the field is absent
    if window is not None and (not isinstance(window, int) or window < positions):
        raise _wrong(
            where,
            "sliding_window",
            config.get("sliding_window", "absent, which means 4096"),
            "null: windows are not implemented yet",
        )


def _rope(config: Mapping[str, Any], where: str) -> Rope:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    field = "rope_parameters" if new is not None else "rope_scaling"
    if new is not None and old is not None:
        raise _wrong(where, "rope_scaling", old, "null beside rope_parameters: they are two spellings of the same")
    scaling = new if new is not None else ({} if old is None else old)
    if not isinstance(scaling, Mapping):
        raise _wrong(where, field, scaling, "an object or null")
    theta = _number(scaling if "rope_theta" in scaling else config, "rope_theta", where, 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    known = {"rope_theta", "rope_type", "type"}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [name for name in names if name not in scaling]
        if missing:
            raise _wrong(where, f"{field}.{missing[0]}", None, "a number: llama3 scaling needs it")
        known.update(names)
    elif kind != "default":
        raise _wrong(where, f"{field}.rope_type", kind, "default or llama3: others are not implemented")
    unknown = sorted(
        set(scaling) - known - ({"partial_rotary_factor"} if scaling.get("partial_rotary_factor") == 1.0 else set())
    )
    if unknown:
        raise LlmtuneFormatError(f"{where}: unknown field {field}.{_short(unknown[0])} with rope_type {kind!r}")
    if kind == "default":
        return Rope(theta)
    factor, low, high = (
        _number(scaling, name, where, None) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if high <= low:
        raise _wrong(where, f"{field}.high_freq_factor", high, f"more than low_freq_factor {low}")
    return Rope(theta, Llama3Scaling(factor, low, high, _positive(scaling, "original_max_position_embeddings", where)))


def _eos(config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str) -> tuple[int, ...]:
    value = (generation or {}).get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    else:
        where = str(Path(where).with_name(GENERATION))
    ids = [] if value is None else (value if isinstance(value, list) else [value])
    if not all(type(i) is int and i >= 0 for i in ids):
        raise _wrong(where, "eos_token_id", value, "a token id or a list of them")
    return tuple(ids)


def _positive(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise _wrong(where, name, value, "a positive integer")
    return value


def _number(config: Mapping[str, Any], name: str, where: str, default: float | None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise _wrong(where, name, value, "a positive number")
    return float(value)


def _flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(where, name, value, "true or false")
    return value


def _token(config: Mapping[str, Any], name: str, where: str) -> int | None:
    value = config.get(name)
    if value is not None and (type(value) is not int or value < -1):
        raise _wrong(where, name, value, "a token id or null")
    return None if value == -1 else value


def _wrong(where: str, name: str, value: Any, expected: str) -> LlmtuneFormatError:
    return LlmtuneFormatError(f"{where}: {name} is {_short(value)}; supported: {expected}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
