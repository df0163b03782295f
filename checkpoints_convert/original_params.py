"""params.json, Meta's and Mistral's, <-> config.json; strict both ways.

    Meta     {"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "use_scaled_rope": true, ...}
    Mistral  {"dim": 5120, "head_dim": 128, "hidden_dim": 14336, "sliding_window": 4096, "moe": {...}, ...}
What a params.json does not tell and the mathematics needs (by how much a scaled rotary embedding is scaled) must be said by
the user; what a config.json says and a params.json cannot is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_convert.hf_config import parse_model_config
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

META_FIELDS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta",
    "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip
MISTRAL_FIELDS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "head_dim", "hidden_dim", "norm_eps", "rope_theta",
    "sliding_window", "moe", "max_seq_len", "max_position_embeddings", "max_batch_size", "tied_embeddings", "use_biases",
    "model_type",
}  # fmt: skip
SCALED = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fixed in Meta's code
FACTORS = "8 in Llama 3.1 and 3.3, 32 in Llama 3.2"
INNER_SIZES = {  # (dim, inner size) -> (ffn_dim_multiplier, multiple_of) as published: many pairs give the same size
    (4096, 14336): (1.3, 1024), (8192, 28672): (1.3, 4096), (16384, 53248): (1.2, 4096), (2048, 8192): (1.5, 256),
    (3072, 8192): (1.0, 256),
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What stands outside of params.json.

    The weights' dtype, the rows of the embedding, whether the head equals it, the rope factor that the user gave.
    """

    dtype: str
    vocab_size: int
    tied: bool
    rope_factor: float | None


def meta_to_hf(params: Mapping[str, Any], known: Known, where: str) -> dict[str, Any]:
    """Meta's params.json -> config.json of a LlamaForCausalLM."""
    _refuse_unknown(params, META_FIELDS, where)
    dim, heads = _natural(params, "dim", where), _natural(params, "n_heads", where)
    if "rope_theta" not in params:
        raise _wrong(where, "rope_theta is missing", "write 500000.0 for Llama 3, 10000.0 for Llama 1 and 2")
    scaling = _meta_scaling(params, known, where)
    vocab = _natural(params, "vocab_size", where) if params.get("vocab_size", -1) != -1 else known.vocab_size
    if dim % heads:
        raise _wrong(where, f"dim {dim} does not divide by n_heads {heads}", "is this file damaged?")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": inner_size(dim, _multiplier(params, where), _natural(params, "multiple_of", where, 256)),
        "num_hidden_layers": _natural(params, "n_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": _natural(params, "n_kv_heads", where, heads),
        "head_dim": dim // heads,
        "rms_norm_eps": _number(params, "norm_eps", where),
        "rope_theta": _number(params, "rope_theta", where),
        "rope_scaling": scaling,
        "max_position_embeddings": params.get("max_seq_len") or (8192 if scaling is None else 131072),
        **_common(known, tokens=(128000, 128001) if vocab == 128256 else (1, 2)),
    }
    parse_model_config(config, None, where)
    return config


def mistral_to_hf(params: Mapping[str, Any], known: Known, where: str) -> dict[str, Any]:
    """Mistral's params.json -> config.json of a MistralForCausalLM or MixtralForCausalLM."""
    if "vision_encoder" in params:
        raise _wrong(
            where, "vision_encoder: a model with a vision tower", "only text models are converted from this layout"
        )
    _refuse_unknown(params, MISTRAL_FIELDS, where)
    window, heads = params.get("sliding_window"), _natural(params, "n_heads", where)
    if window is not None and (type(window) is not int or window <= 0):
        raise _wrong(where, f"sliding_window is {_short(window)}", "a positive integer or null is understood")
    if params.get("use_biases"):
        raise _wrong(where, "use_biases is true", "models of this layout are read without biases only")
    if params.get("rope_theta") is None and window is None:
        raise _wrong(where, "rope_theta is missing", "its default differs between programs; write 1000000.0 or 10000.0")
    if params.get("tied_embeddings") and not known.tied:
        raise _wrong(
            where, "tied_embeddings is true, but output.weight differs from tok_embeddings.weight", "which is it?"
        )
    mixture = params.get("moe")
    name = "Mistral" if mixture is None else "Mixtral"
    config = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": _natural(params, "vocab_size", where, known.vocab_size),
        "hidden_size": _natural(params, "dim", where),
        "intermediate_size": _natural(params, "hidden_dim", where),
        "num_hidden_layers": _natural(params, "n_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": _natural(params, "n_kv_heads", where, heads),
        "head_dim": _natural(params, "head_dim", where),
        "rms_norm_eps": _number(params, "norm_eps", where),
        "rope_theta": 10_000.0 if params.get("rope_theta") is None else _number(params, "rope_theta", where),
        "sliding_window": window,
        "max_position_embeddings": params.get("max_position_embeddings") or params.get("max_seq_len") or 32768,
        **_common(known, tokens=(1, 2)),
        **({} if mixture is None else _experts(mixture, where)),
    }
    parse_model_config(config, None, where)
    return config


def meta_from_hf(config: ModelConfig, hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM -> Meta's params.json; refuses by name what that cannot say."""
    if config.architecture != "LlamaForCausalLM":
        raise _wrong(where, f"architectures is {config.architecture}", "Meta's layout holds LlamaForCausalLM only")
    _refuse_biases(hf, where)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise _wrong(
            where, f"head_dim is {config.head_dim}", "in Meta's layout it is hidden_size / num_attention_heads"
        )
    scaling = rope_of(hf)
    factor = scaling.get("factor")
    if scaling.get("rope_type") not in (None, "default", "llama3"):
        raise _wrong(where, f"rope_type is {_short(scaling['rope_type'])}", "Meta's layout knows llama3 scaling only")
    if factor is not None and any(scaling.get(name) != value for name, value in SCALED.items()):
        raise _wrong(where, f"rope_scaling is {_short(scaling)}", f"Meta's code fixes {SCALED}")
    multiplier, multiple = inner_factors(config.hidden_size, config.intermediate_size)
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "use_scaled_rope": factor is not None,
        **({} if factor is None else {"rope_scaling_factor": factor}),
    }


def mistral_from_hf(config: ModelConfig, hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of a Mistral or Mixtral model -> Mistral's params.json; refuses by name what that cannot say."""
    if config.architecture not in ("MistralForCausalLM", "MixtralForCausalLM"):
        raise _wrong(
            where, f"architectures is {config.architecture}", "Mistral's layout holds Mistral and Mixtral models only"
        )
    _refuse_biases(hf, where)
    kind = rope_of(hf).get("rope_type", "default")
    if kind != "default":
        raise _wrong(
            where, f"rope_type is {_short(kind)}", "scaled rotary embeddings are not written in Mistral's layout"
        )
    if len(set(hf.get("layer_types") or ())) > 1:
        raise _wrong(where, "layer_types alternate", "Mistral's layout has one sliding_window for all layers")
    dense = config.architecture == "MistralForCausalLM"
    window = hf.get("sliding_window", 4096 if dense else None)
    if set(hf.get("layer_types") or ()) == {"full_attention"}:
        window = None
    experts = {"num_experts": hf.get("num_local_experts", 8), "num_experts_per_tok": hf.get("num_experts_per_tok", 2)}
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position_embeddings,
        **({} if window is None else {"sliding_window": window}),
        **({"tied_embeddings": True} if config.tie_word_embeddings else {}),
        **({} if dense else {"moe": experts}),
    }


def rope_of(hf: Mapping[str, Any]) -> dict[str, Any]:
    """How config.json scales its rotary embedding, in either spelling; {} where it does not."""
    return dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})


def inner_size(dim: int, multiplier: float | None, multiple: int) -> int:
    """Meta's rule: two thirds of 4 dim, times the multiplier, rounded down; then up to a multiple."""
    inner = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        inner = int(multiplier * inner)
    return multiple * ((inner + multiple - 1) // multiple)


def inner_factors(dim: int, inner: int) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) that give this inner size by Meta's rule: the published pair, or an exact one."""
    if (dim, inner) in INNER_SIZES:
        return INNER_SIZES[dim, inner]
    multiple = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if inner % size == 0)
    multiplier = float(inner / int(2 * (4 * dim) / 3))
    while inner_size(dim, multiplier, multiple) < inner:
        multiplier = float(np.nextafter(multiplier, np.inf))
    return multiplier, multiple


def _multiplier(params: Mapping[str, Any], where: str) -> float | None:
    return None if params.get("ffn_dim_multiplier") is None else _number(params, "ffn_dim_multiplier", where)


def _meta_scaling(params: Mapping[str, Any], known: Known, where: str) -> dict[str, Any] | None:
    given, said = params.get("rope_scaling_factor"), known.rope_factor
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise _wrong(where, f"use_scaled_rope is {_short(scaled)}", "true or false is expected")
    if not scaled:
        if said is not None:
            raise _wrong(
                where, "use_scaled_rope is not set", f"a rope scaling factor of {said} does not belong to this model"
            )
        return None
    if given is None and said is None:
        raise _wrong(
            where, "use_scaled_rope is true, but by how much it scales is told nowhere",
            f"give --rope-scaling-factor ({FACTORS}), or --like with a config.json of this model",
        )  # fmt: skip
    if given is not None and said is not None and given != said:
        raise _wrong(where, f"rope_scaling_factor is {_short(given)}", f"{said} was asked for: which is it?")
    factor = said if given is None else _number(params, "rope_scaling_factor", where)
    return {"rope_type": "llama3", "factor": factor, **SCALED}


def _common(known: Known, tokens: tuple[int, int]) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "tie_word_embeddings": known.tied,
        "initializer_range": 0.02,
        "bos_token_id": tokens[0],
        "eos_token_id": tokens[1],
        "torch_dtype": known.dtype,
    }


def _experts(mixture: Any, where: str) -> dict[str, Any]:
    if not isinstance(mixture, Mapping) or set(mixture) != {"num_experts", "num_experts_per_tok"}:
        raise _wrong(where, f"moe is {_short(mixture)}", "num_experts and num_experts_per_tok are understood")
    return {
        "num_local_experts": _natural(mixture, "num_experts", where),
        "num_experts_per_tok": _natural(mixture, "num_experts_per_tok", where),
    }


def _refuse_unknown(params: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(params) - known)
    if unknown:
        raise _wrong(
            where, f"unknown field {_short(unknown[0])} ({_short(params[unknown[0]])}), which may change the mathematics",
            "remove it if it does not",
        )  # fmt: skip


def _refuse_biases(hf: Mapping[str, Any], where: str) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            raise _wrong(where, f"{name} is true", "this layout has no biases")


def _natural(params: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = params.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise _wrong(where, f"{name} is {_short(value)}", "a positive integer is expected")
    return value


def _number(params: Mapping[str, Any], name: str, where: str) -> float:
    value = params.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise _wrong(where, f"{name} is {_short(value)}", "a positive number is expected")
    return float(value)


def _wrong(where: str, what: str, mend: str) -> LlmtuneFormatError:
    return LlmtuneFormatError(f"{where}: {what}; {mend}")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
