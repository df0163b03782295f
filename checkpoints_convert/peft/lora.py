"""LoRA and DoRA in PEFT directories.

The tensors present are the truth about which modules are adapted; rank_pattern and alpha_pattern say with which scale. `factors`
has the names of the tensors, `experts` those of experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_convert.hf_names import Tensor, root_module, tensors
from checkpoints_convert.peft import experts
from checkpoints_convert.peft.directory import CONFIG, PeftDirectory, is_number, is_rank, of_pattern
from checkpoints_convert.peft.factors import KEY, SIDES, Factors, Pair, alpha_of, check_pair, stack, turned, unstack
from checkpoints_convert.peft.whole import whole_name
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

HEAD, EMBEDDING, EXPERTS, TABLE = "lm_head", "embed_tokens", "mlp.experts", "embed/table"
READ = {
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_parameters",
}  # fmt: skip
HARMLESS = {
    "lora_dropout", "megatron_core", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size",
}  # fmt: skip
KEEP_BASE = (
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # initialisers that leave the base as it is; pissa, olora... do not
REFUSED = {  # field -> the values under which it changes nothing
    "bias": ("none", None), "fan_in_fan_out": (False, None), "lora_bias": (False, None), "layer_replication": (None, []),
    "megatron_config": (None,), "trainable_token_indices": (None, {}, []), "use_qalora": (False, None),
    "alora_invocation_tokens": (None,), "arrow_config": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class LoraValues:
    """What a LoRA directory holds, by our paths."""

    factors: Mapping[str, Factors]
    rslora: bool
    dropout: float = 0.0


def read(directory: PeftDirectory, config: ModelConfig) -> LoraValues | None:
    """The factors, every shape checked against a base of this configuration."""
    _check_settings(directory)
    pairs, fused = _pairs(directory, config)
    factors = {}
    for path in dict.fromkeys(tensor.path for tensor in tensors(config)):
        layers = [tensor for tensor in tensors(config) if tensor.path == path]
        if any(tensor.name in pairs for tensor in layers):
            factors[path] = stack(layers, pairs, lambda module, rank: _scale(directory, module, rank))
    factors |= experts.to_weights(fused, config)
    return LoraValues(factors, bool(directory.settings.get("use_rslora"))) if factors else None


def adapts_an_end(directory: PeftDirectory) -> bool:
    """Whether the embedding or the head has factors."""
    modules = (match["module"] for key in directory.weights.tensors if (match := KEY.fullmatch(key)) is not None)
    return any(module.endswith((EMBEDDING, HEAD)) for module in modules)


def write(values: LoraValues, config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Tensors and settings. The most common rank and alpha are the default, others go into the patterns."""
    table = {(tensor.path, tensor.index): tensor for tensor in tensors(config)}
    entries, ranks, alphas = [], {}, {}
    fusible = {path: own for path, own in values.factors.items() if "/experts/" in path and own.magnitude is None}
    for path, own in values.factors.items():
        for place, rank, pair, scale in () if path in fusible else unstack(own):
            module = table[path, place].name.removesuffix(".weight")
            ranks[module], alphas[module] = rank, alpha_of(scale, rank, values.rslora)
            entries += _entries(module, pair, embedding=module.endswith(EMBEDDING))
            if (
                module.endswith(EMBEDDING) and config.tie_word_embeddings
            ):  # one adapter, which peft writes for both ends
                ranks[HEAD], alphas[HEAD] = ranks[module], alphas[module]
                entries += _entries(HEAD, turned(pair))
    fused = experts.to_fused(fusible)
    parameters = {}
    for (layer, parameter), one in fused.items():
        module, rank = f"{root_module(config)}.layers.{layer}.{EXPERTS}", one.a.shape[1]
        nested = parameter == "gate_up_proj" and (layer, "down_proj") in fused
        entries += _entries(f"{module}.base_layer" if nested else module, experts.fused_pair(one))
        parameters[f"{module}.{parameter}"] = f"{EXPERTS}.{parameter}"
        ranks[f"{module}.{parameter}"] = rank
        alphas[f"{module}.{parameter}"] = alpha_of(one.scale, rank, values.rslora)
    dora = any(own.magnitude is not None for own in values.factors.values())
    return entries, {
        **_settings(ranks, alphas, parameters, config, values.rslora),
        "lora_dropout": values.dropout,
        "use_dora": dora,
        **({"ensure_weight_tying": True} if config.tie_word_embeddings and TABLE in values.factors else {}),
    }


def _entries(module: str, pair: Pair, *, embedding: bool = False) -> list[Entry]:
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    named = [*zip(names, (pair.a, pair.b), strict=True), ("lora_magnitude_vector", pair.magnitude)]
    found = []
    for name, matrix in named:
        if matrix is not None:
            array = np.ascontiguousarray(matrix, dtype=np.float32)
            found.append(Entry(f"base_model.model.{module}.{name}", array.dtype, array.shape, lambda own=array: own))
    return found


def _settings(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    parameters: Mapping[str, str],
    config: ModelConfig,
    rslora: bool,
) -> dict[str, Any]:
    rank, alpha = _most_common(ranks), _most_common(alphas)
    modules = [module for module in ranks if module not in parameters]
    stacked = [module for module in modules if ".layers." in module]
    inside = {module.partition(".layers.")[2].partition(".")[2] for module in stacked}
    root = stacked[0].partition(".layers.")[0] if stacked else "model"
    layers = sorted({int(module.partition(".layers.")[2].split(".")[0]) for module in stacked})
    every_layer = root == "model" and all(f"model.layers.{n}.{own}" in ranks for own in inside for n in layers)
    partly = every_layer and 0 < len(layers) < config.num_hidden_layers
    if parameters and partly:
        every_layer = partly = False  # `layers_to_transform` would hold for the experts too
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted({own.rsplit(".", 1)[-1] for own in modules}) if every_layer else sorted(modules),
        "target_parameters": _parameter_names(parameters, config) or None,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "layers_to_transform": layers if partly else None,
        "layers_pattern": None,
    }


def _parameter_names(parameters: Mapping[str, str], config: ModelConfig) -> list[str]:
    """Short where every layer has the parameter, else one name for each layer."""
    short = sorted(set(parameters.values()))
    complete = len(parameters) == len(short) * config.num_hidden_layers
    return short if complete else sorted(parameters)


def _check_settings(directory: PeftDirectory) -> None:
    directory.check_fields(READ, HARMLESS, REFUSED)
    settings = directory.settings
    init = settings.get("init_lora_weights", True)
    if not isinstance(init, bool) and str(init).lower() not in KEEP_BASE:
        raise directory.refuse(
            "init_lora_weights", "it changed the base's weights too; convert the adapter to plain LoRA in peft"
        )
    if not is_rank(settings.get("r", 8)):
        raise directory.refuse("r", "a positive integer is needed")
    if not is_number(settings.get("lora_alpha", 8)):
        raise directory.refuse("lora_alpha", "a number is needed")
    if settings.get("use_dora") not in (None, False, True):
        raise directory.refuse("use_dora", "true or false is needed")
    directory.check_patterns("rank_pattern", is_rank)
    directory.check_patterns("alpha_pattern", is_number)


def _pairs(
    directory: PeftDirectory, config: ModelConfig
) -> tuple[dict[str, Pair], dict[tuple[int, str], experts.Fused]]:
    """({Hugging Face weight name: pair}, {(layer, fused parameter): factors}), float32, shapes checked against the base.

    What peft writes of a shared adapter for the head of a tied model must be the embedding's, and is left out.
    """
    weights, known = directory.weights, {tensor.name: tensor for tensor in tensors(config)}
    shared = config.tie_word_embeddings and bool(directory.settings.get("ensure_weight_tying"))
    if shared:
        _check_shared(directory, config)
    sides: dict[tuple[str, str], dict[str, str]] = {}
    for key, info in weights.tensors.items():
        if whole_name(key) is not None:
            continue
        match = KEY.fullmatch(key)
        if match is None:
            raise LlmtuneFormatError(
                f"{info.file}: {key} is no LoRA factor of a layer's matrix, which is all that is read so far"
            )
        if shared and match["module"] == HEAD:
            continue
        name, fused = f"{match['module']}.weight", match["module"].endswith(EXPERTS) and config.experts is not None
        if not fused and (name not in known or not _is_matrix(known[name])):
            raise LlmtuneFormatError(f"{info.file}: {key} adapts a module that this base model does not have")
        under = (
            match["under"] if fused else ""
        )  # elsewhere it says how the weight was wrapped, and nothing of the factor
        sides.setdefault((match["module"], under), {})[SIDES[match["side"]]] = key
    pairs, found = {}, {}
    for (module, _), keys in sides.items():
        if not {"A", "B"} <= set(keys):
            raise LlmtuneFormatError(f"{weights.path}: {module} has only lora_{min(keys)}; the adapter is incomplete")
        a, b = (weights.read(keys[side]).astype(np.float32) for side in "AB")
        pair = Pair(a, b, weights.read(keys["m"]).astype(np.float32) if "m" in keys else None)
        if bool(directory.settings.get("use_dora")) != ("m" in keys) and not module.endswith(EXPERTS):
            raise LlmtuneFormatError(f"{weights.path}: {module} and use_dora in {CONFIG} do not fit each other")
        if f"{module}.weight" in known:
            shape = known[f"{module}.weight"].shape
            table = not known[f"{module}.weight"].transposed
            pairs[f"{module}.weight"] = check_pair(weights.path, module, pair, shape[::-1] if table else shape)  # type: ignore[arg-type]
        else:
            parameter, own_a, own_b = experts.split_fused(weights.path, module, pair, config)
            layer = int(module.partition(".layers.")[2].split(".")[0])
            scale = _scale(directory, f"{module}.{parameter}", own_a.shape[1])
            found[layer, parameter] = experts.Fused(own_a, own_b, scale)
    return pairs, found


def _check_shared(directory: PeftDirectory, config: ModelConfig) -> None:
    """Of an adapter that both ends of a tied model share, the head's tensors are the embedding's, transposed."""
    weights, prefix = directory.weights, "base_model.model"
    table = f"{prefix}.{root_module(config)}.{EMBEDDING}.lora_embedding_"
    for side, other in (("A", "B"), ("B", "A")):
        head = f"{prefix}.{HEAD}.lora_{side}.weight"
        if head in weights.tensors and not (
            table + other in weights.tensors and np.array_equal(weights.read(head), weights.read(table + other).T)
        ):
            raise LlmtuneFormatError(
                f"{weights.path}: {head} is not {table}{other}, though ensure_weight_tying says that both ends share one adapter"
            )


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.transposed or tensor.path == TABLE


def _scale(directory: PeftDirectory, module: str, rank: int) -> float:
    settings = directory.settings
    declared = of_pattern(settings.get("rank_pattern"), module, settings.get("r", 8))
    if declared != rank:
        raise LlmtuneFormatError(
            f"{directory.path / CONFIG}: {module} is declared with rank {declared}, its tensors have {rank}"
        )
    alpha = of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _most_common(values: Mapping[str, Any]) -> Any:
    listed = list(values.values())
    return max(dict.fromkeys(listed), key=listed.count)
