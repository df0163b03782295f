"""LoRA in PEFT directories.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  [rank, in]     ->  a[3] = its transpose, [in, rank]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight  [out, rank]    ->  b[3] = its transpose, [rank, out]

The tensors present are the truth about which modules are adapted; rank_pattern and alpha_pattern say with which scale. Layers
without an adapter, or of a smaller rank, are padded with zeros.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.hf_names import MODULES, SEGMENT, Tensor, tensors
from checkpoints_convert.peft.directory import CONFIG, PeftDirectory, is_number, is_rank, of_pattern
from checkpoints_convert.peft.whole import whole_name
from checkpoints_convert.safetensors_reader import WeightDirectory
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

HEAD = "lm_head"
KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.(language_model\.)?layers\.\d+\.[a-z_]+\.[a-z_]+|lm_head)(\.base_layer)?\.lora_(?P<side>[AB])(\.(?!weight)\w+)?\.weight"
)
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
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
    "use_dora": (False, None), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "lora_bias": (False, None), "target_parameters": (None, []), "layer_replication": (None, []),
    "megatron_config": (None,), "trainable_token_indices": (None, {}, []), "use_qalora": (False, None),
    "alora_invocation_tokens": (None,), "arrow_config": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """One weight's adapter: float32 a [L, in, rank], b [L, rank, out], scale [L]; `ranks` where they differ.

    The head is no stack: there L is left out.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    ranks: tuple[int, ...] | None


@dataclass(frozen=True)
class LoraValues:
    """What a LoRA directory holds, by our paths."""

    factors: Mapping[str, Factors]
    rslora: bool


def read(directory: PeftDirectory, config: ModelConfig) -> LoraValues | None:
    """The factors, every shape checked against a base of this configuration."""
    _check_settings(directory)
    pairs = _pairs(directory.weights, config)
    rslora = bool(directory.settings.get("use_rslora"))
    factors = {}
    for path in dict.fromkeys(tensor.path for tensor in tensors(config)):
        layers = [tensor for tensor in tensors(config) if tensor.path == path]
        if any(tensor.name in pairs for tensor in layers):
            factors[path] = _stack(layers, pairs, directory.settings, rslora, directory.path / CONFIG)
    return LoraValues(factors, rslora) if factors else None


def write(values: LoraValues, config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Tensors and settings. The most common rank and alpha are the default, others go into the patterns."""
    table = {(tensor.path, tensor.layer): tensor for tensor in tensors(config)}
    entries, ranks, alphas = [], {}, {}
    for path, own in values.factors.items():
        for layer, a, b, scale in _layers(own):
            rank = own.a.shape[-1] if own.ranks is None or layer is None else own.ranks[layer]
            if rank == 0:
                continue
            module = table[path, layer].name.removesuffix(".weight")
            ranks[module], alphas[module] = rank, _alpha(float(scale), rank, values.rslora)
            for side, matrix in (("A", a[:, :rank].T), ("B", b[:rank].T)):
                array = np.ascontiguousarray(matrix, dtype=np.float32)
                key = f"base_model.model.{module}.lora_{side}.weight"
                entries.append(Entry(key, array.dtype, array.shape, lambda array=array: array))
    return entries, _settings(ranks, alphas, values.factors, values.rslora)


def _layers(factors: Factors) -> list[tuple[int | None, np.ndarray, np.ndarray, np.ndarray]]:
    """(layer, a, b, scale) of each matrix; the layer of one that is no stack is None."""
    if factors.a.ndim == 2:
        return [(None, factors.a, factors.b, factors.scale)]
    return [(k, factors.a[k], factors.b[k], factors.scale[k]) for k in range(len(factors.scale))]


def _settings(
    ranks: Mapping[str, int], alphas: Mapping[str, float], factors: Mapping[str, Factors], rslora: bool
) -> dict[str, Any]:
    rank, alpha = _most_common(ranks), _most_common(alphas)
    stacked = [MODULES[path.removeprefix(f"{SEGMENT}/")] for path in factors if path.startswith(SEGMENT)]
    root = next((module.partition(".layers.")[0] for module in ranks if module != HEAD), "model")
    layers = sorted({int(module.partition(".layers.")[2].split(".")[0]) for module in ranks if module != HEAD})
    every_layer = root == "model" and all(f"model.layers.{n}.{module}" in ranks for module in stacked for n in layers)
    targets = sorted({module.rsplit(".", 1)[-1] for module in [*stacked, *(m for m in ranks if m == HEAD)]})
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": targets if every_layer else sorted(ranks),
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "layers_to_transform": layers if every_layer and 0 < len(layers) < _depth(factors) else None,
        "layers_pattern": None,
    }


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
    directory.check_patterns("rank_pattern", is_rank)
    directory.check_patterns("alpha_pattern", is_number)


def _pairs(weights: WeightDirectory, config: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{Hugging Face weight name: (A [rank, in], B [out, rank])} in float32, every shape checked against the base."""
    known = {tensor.name: tensor for tensor in tensors(config)}
    sides: dict[str, dict[str, str]] = {}
    for key, info in weights.tensors.items():
        if whole_name(key) is not None:
            continue
        match = KEY.fullmatch(key)
        if match is None:
            raise LlmtuneFormatError(
                f"{info.file}: {key} is no LoRA factor of a layer's matrix, which is all that is read so far"
            )
        name = f"{match['module']}.weight"
        if name not in known or not known[name].transposed:
            raise LlmtuneFormatError(f"{info.file}: {key} adapts a module that this base model does not have")
        sides.setdefault(name, {})[match["side"]] = key
    pairs = {}
    for name, keys in sides.items():
        if set(keys) != {"A", "B"}:
            raise LlmtuneFormatError(f"{weights.path}: {name} has only lora_{min(keys)}; the adapter is incomplete")
        a, b = (weights.read(keys[side]).astype(np.float32) for side in "AB")
        out, n_in = known[name].shape
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != n_in or b.shape[0] != out or a.shape[0] != b.shape[1]:
            raise LlmtuneFormatError(
                f"{weights.path}: {name} has A {list(a.shape)} and B {list(b.shape)} where the base is [{out}, {n_in}]; "
                "the adapter was made for another base model"
            )
        pairs[name] = (a, b)
    return pairs


def _stack(
    layers: list[Tensor],
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: Mapping[str, Any],
    rslora: bool,
    where: Path,
) -> Factors:
    out, n_in = layers[0].shape
    ranks = tuple(pairs[t.name][0].shape[0] if t.name in pairs else 0 for t in layers)
    widest = max(ranks)
    a = np.zeros((len(layers), n_in, widest), np.float32)
    b = np.zeros((len(layers), widest, out), np.float32)
    scale = np.zeros(len(layers), np.float32)
    for k, tensor in enumerate(layers):
        if ranks[k]:
            own_a, own_b = pairs[tensor.name]
            a[k, :, : ranks[k]], b[k, : ranks[k]] = own_a.T, own_b.T
            scale[k] = _scale(tensor.name.removesuffix(".weight"), ranks[k], settings, rslora, where)
    if layers[0].layer is None:
        return Factors(a[0], b[0], scale.reshape(()), None)
    return Factors(a, b, scale, None if set(ranks) == {widest} else ranks)


def _scale(module: str, rank: int, settings: Mapping[str, Any], rslora: bool, where: Path) -> float:
    declared = of_pattern(settings.get("rank_pattern"), module, settings.get("r", 8))
    if declared != rank:
        raise LlmtuneFormatError(f"{where}: {module} is declared with rank {declared}, its tensors have {rank}")
    alpha = of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """Alpha back from a float32 scale: the shortest decimal that gives this very scale, an int where it is one."""
    divisor = math.sqrt(rank) if rslora else rank
    exact = scale * divisor
    candidates = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    alpha = next((own for own in candidates if np.float32(own / divisor) == np.float32(scale)), exact)
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    listed = list(values.values())
    return max(dict.fromkeys(listed), key=listed.count)


def _depth(factors: Mapping[str, Factors]) -> int:
    return max(own.scale.size for own in factors.values())
