"""Bottleneck adapters and their fusion, which peft does not have, in directories laid out as its own are.

    peft_type LLMTUNE_SEQUENTIAL   base_model.model.model.layers.3.mlp.down_proj.adapter.down          [size, hidden]
    peft_type LLMTUNE_PARALLEL     base_model.model.model.layers.3.mlp.adapter.up_bias                 [hidden], and `scale`
    peft_type LLMTUNE_FUSION       base_model.model.model.layers.3.mlp.down_proj.adapter.0.up          [hidden, size], of each one
                                   base_model.model.model.layers.3.mlp.down_proj.fusion.query          [hidden, hidden]

Matrices lie as torch's do, [out, in]. peft refuses these directories by the name of their type; nothing else reads them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_convert.hf_names import MODULES, SEGMENT, root_module
from checkpoints_convert.peft.directory import PeftDirectory, is_number
from checkpoints_convert.peft.whole import whole_name
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

KEY = re.compile(
    r"base_model\.model\.model(\.language_model)?\.layers\.(?P<layer>\d+)\.(?P<module>[a-z_.]+?)"
    r"\.(adapter(\.(?P<number>\d+))?\.(?P<branch>(down|up)(_bias)?)|fusion\.(?P<head>query|key|value))"
)
SLOT, SLOT_MODULE = "mlp/adapter", "mlp"  # a parallel adapter stands beside the whole MLP
BRANCH, HEADS = ("down", "down_bias", "up", "up_bias"), ("query", "key", "value")
Fields = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Branches:
    """By our path, the fields of each branch: [L, ...]; of a fusion's [L, adapters, ...], and query, key, value.

    `scales`: of parallel branches, float32 [L].
    """

    fields: Mapping[str, Fields]
    scales: Mapping[str, np.ndarray]


def read(directory: PeftDirectory, config: ModelConfig) -> Branches | None:
    """Every field stacked over all layers. Raises LlmtuneFormatError where a layer lacks one; transforms check the shapes."""
    directory.check_fields({"size", "scale", "adapters"}, (), {"non_linearity": ("relu",)})
    found: dict[str, dict[str, dict[tuple[int, int], np.ndarray]]] = {}
    for key, info in directory.weights.tensors.items():
        if whole_name(key) is not None:
            continue
        match = KEY.fullmatch(key)
        path = None if match is None else _paths().get(match["module"])
        if match is None or path is None:
            raise LlmtuneFormatError(f"{info.file}: {key} is no part of a bottleneck adapter")
        field, value = match["branch"] or match["head"], directory.weights.read(key).astype(np.float32)
        place = int(match["layer"]), int(match["number"] or 0)
        found.setdefault(path, {}).setdefault(field, {})[place] = value.T  # of a bias, itself
    if not found:
        return None
    fused = directory.settings.get("peft_type") == "LLMTUNE_FUSION"
    fields = {
        path: {f: _stack(directory, path, f, own, config, fused) for f, own in each.items()}
        for path, each in found.items()
    }
    for path, each in fields.items():
        odd = sorted({*BRANCH, *(HEADS if fused else ())} ^ set(each))
        if odd:
            raise LlmtuneFormatError(f"{directory.weights.path}: {path} lacks {odd[0]}, or has it where none belongs")
    scale = directory.settings.get("scale", 1.0)
    if not is_number(scale):
        raise directory.refuse("scale", "a number is needed")
    return Branches(fields, {path: np.full(config.num_hidden_layers, scale, np.float32) for path in fields})


def write(values: Branches, config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Tensors and settings of any of the three."""
    modules = {path: module for module, path in _paths().items()}
    entries = []
    for path, fields in values.fields.items():
        for field, stack in fields.items():
            numbered = "query" in fields and field in BRANCH
            for layer, own in enumerate(stack):
                for number, value in enumerate(own if numbered else [own]):
                    array = np.ascontiguousarray(value.T, dtype=np.float32)
                    inner = f"adapter.{number}" if numbered else "adapter" if field in BRANCH else "fusion"
                    name = f"base_model.model.{root_module(config)}.layers.{layer}.{modules[path]}.{inner}.{field}"
                    entries.append(Entry(name, array.dtype, array.shape, lambda array=array: array))
    first = next(iter(values.fields.values()))
    settings: dict[str, Any] = {"size": first["down"].shape[-1], "non_linearity": "relu"}
    if "query" in first:
        settings["adapters"] = first["down"].shape[1]
    scales = {float(scale) for own in values.scales.values() for scale in own}
    return entries, settings | ({"scale": scales.pop()} if len(scales) == 1 else {})


def _stack(
    directory: PeftDirectory,
    path: str,
    field: str,
    own: Mapping[tuple[int, int], np.ndarray],
    config: ModelConfig,
    fused: bool,
) -> np.ndarray:
    """The layers of one field, [L, ...]; of a fusion's branches [L, adapters, ...]."""
    numbers = range(1 + max(number for _, number in own))
    expected = {(layer, number) for layer in range(config.num_hidden_layers) for number in numbers}
    if set(own) != expected:
        layer, number = sorted(set(own) ^ expected)[0]
        raise LlmtuneFormatError(
            f"{directory.weights.path}: {path} has {field} in {len(own)} places, not in {len(expected)} (layer {layer}, "
            f"adapter {number}); it is incomplete, or was made for another base model"
        )
    shapes = {value.shape for value in own.values()}
    if len(shapes) > 1:
        raise LlmtuneFormatError(f"{directory.weights.path}: {path} has {field} of several shapes, {sorted(shapes)}")
    stack = np.stack(
        [np.stack([own[layer, number] for number in numbers]) for layer in range(config.num_hidden_layers)]
    )
    return stack if fused and field in BRANCH else stack[:, 0]


def _paths() -> dict[str, str]:
    """The module's name below a layer -> our path."""
    projections = {module: f"{SEGMENT}/{path}" for path, module in MODULES.items()}
    return {**projections, SLOT_MODULE: f"{SEGMENT}/{SLOT}"}
