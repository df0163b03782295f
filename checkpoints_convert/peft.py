"""PEFT adapter directories in and out: adapter_config.json + adapter_model.safetensors.

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
from checkpoints_convert.safetensors_header import read_header
from checkpoints_convert.safetensors_reader import WeightDirectory, read_json
from checkpoints_convert.safetensors_writer import Entry as FileEntry
from checkpoints_convert.safetensors_writer import new_directory, write_file, write_json
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.\d+\.[a-z_]+\.[a-z_]+)(\.base_layer)?\.lora_(?P<side>[AB])(\.(?!weight)\w+)?\.weight"
)
REFUSED = {  # field -> the values under which it changes nothing
    "use_dora": (False, None), "modules_to_save": (None, []), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "lora_bias": (False, None), "target_parameters": (None, []), "layer_replication": (None, []),
    "megatron_config": (None,), "trainable_token_indices": (None, {}, []), "use_qalora": (False, None),
    "alora_invocation_tokens": (None,), "arrow_config": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """One stacked weight's adapter: float32 a [L, in, rank], b [L, rank, out], scale [L]; `ranks` where they differ."""

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    ranks: tuple[int, ...] | None


@dataclass(frozen=True)
class Adapter:
    """What a PEFT directory holds, by our paths."""

    base: str | None
    rslora: bool
    factors: Mapping[str, Factors]


def read_adapter(directory: Path, config: ModelConfig) -> Adapter:
    """A LoRA adapter for a model of this shape. Raises LlmtuneFormatError where it is of another kind or base."""
    if not (directory / CONFIG).is_file():
        raise LlmtuneFormatError(f"{directory}: no {CONFIG} there; a PEFT adapter directory is needed")
    settings = read_json(directory / CONFIG)
    _check_settings(settings, directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        pickled = (
            " (adapter_model.bin is a pickle: convert it to safetensors)"
            if (directory / "adapter_model.bin").exists()
            else ""
        )
        raise LlmtuneFormatError(f"{directory}: no {WEIGHTS} there{pickled}")
    weights = WeightDirectory(directory, read_header(directory / WEIGHTS))
    pairs = _pairs(weights, config)
    rslora = bool(settings.get("use_rslora"))
    factors = {}
    for path in dict.fromkeys(tensor.path for tensor in tensors(config)):
        layers = [tensor for tensor in tensors(config) if tensor.path == path]
        if any(tensor.name in pairs for tensor in layers):
            factors[path] = _stack(layers, pairs, settings, rslora, directory / CONFIG)
    return Adapter(settings.get("base_model_name_or_path"), rslora, factors)


def write_adapter(
    directory: Path, factors: Mapping[str, Factors], config: ModelConfig, *, base: str, rslora: bool
) -> None:
    """A directory that peft loads. The most common rank and alpha are the default, others go into the patterns."""
    table = {(tensor.path, tensor.layer): tensor for tensor in tensors(config)}
    entries, ranks, alphas = [], {}, {}
    for path, own in factors.items():
        for layer, (a, b, scale) in enumerate(zip(own.a, own.b, own.scale, strict=True)):
            rank = own.a.shape[-1] if own.ranks is None else own.ranks[layer]
            if rank == 0:
                continue
            module = table[path, layer].name.removesuffix(".weight")
            ranks[module], alphas[module] = rank, _alpha(scale, rank, rslora)
            for side, matrix in (("A", a[:, :rank].T), ("B", b[:rank].T)):
                array = np.ascontiguousarray(matrix, dtype=np.float32)
                key = f"base_model.model.{module}.lora_{side}.weight"
                entries.append(FileEntry(key, array.dtype, array.shape, lambda array=array: array))
    settings = _settings(ranks, alphas, factors, base, rslora)
    with new_directory(directory, sum(entry.nbytes for entry in entries)) as partial:
        write_file(partial / WEIGHTS, sorted(entries, key=lambda entry: entry.name))
        write_json(partial / CONFIG, settings)


def _settings(
    ranks: Mapping[str, int], alphas: Mapping[str, float], factors: Mapping[str, Factors], base: str, rslora: bool
) -> dict[str, Any]:
    rank, alpha = _most_common(ranks), _most_common(alphas)
    targets = sorted({MODULES[path.removeprefix(f"{SEGMENT}/")].rsplit(".", 1)[-1] for path in factors})
    layers = sorted({int(module.split(".")[2]) for module in ranks})
    every_layer = all(
        f"model.layers.{n}.{MODULES[path.removeprefix(f'{SEGMENT}/')]}" in ranks for path in factors for n in layers
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": targets if every_layer else sorted(ranks),
        "modules_to_save": None,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "layers_to_transform": layers if every_layer and len(layers) < _depth(factors) else None,
        "layers_pattern": None,
        "revision": None,
    }


def _check_settings(settings: Mapping[str, Any], where: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise LlmtuneFormatError(f"{where}: peft_type is {kind!r}; only LORA adapters are read so far")
    for name, harmless in REFUSED.items():
        if settings.get(name) not in harmless:
            raise LlmtuneFormatError(f"{where}: {name} is {settings[name]!r}, which is not supported so far")
    if type(settings.get("r", 8)) is not int or settings.get("r", 8) < 1:
        raise LlmtuneFormatError(f"{where}: r is {settings.get('r')!r}; a positive integer is needed")


def _pairs(weights: WeightDirectory, config: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{Hugging Face weight name: (A [rank, in], B [out, rank])} in float32, every shape checked against the base."""
    known = {tensor.name: tensor for tensor in tensors(config)}
    sides: dict[str, dict[str, str]] = {}
    for key, info in weights.tensors.items():
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
    if not pairs:
        raise LlmtuneFormatError(f"{weights.path}: the adapter holds no tensors")
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
    return Factors(a, b, scale, None if set(ranks) == {widest} else ranks)


def _scale(module: str, rank: int, settings: Mapping[str, Any], rslora: bool, where: Path) -> float:
    declared = _pattern(settings.get("rank_pattern"), module, settings.get("r", 8))
    if declared != rank:
        raise LlmtuneFormatError(f"{where}: {module} is declared with rank {declared}, its tensors have {rank}")
    alpha = _pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Peft's rule: the first pattern that matches the end of the module's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """Alpha back from a float32 scale: the shortest decimal that rounds to the product, an int where it is one."""
    exact = float(scale) * (math.sqrt(rank) if rslora else rank)
    alpha = float(str(np.float32(exact)))
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    listed = list(values.values())
    return max(dict.fromkeys(listed), key=listed.count)


def _depth(factors: Mapping[str, Factors]) -> int:
    return max(len(own.scale) for own in factors.values())
