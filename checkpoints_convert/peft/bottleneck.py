"""Bottleneck adapters and their fusion, which peft does not have, in directories laid out as its own are.

    peft_type LLMTUNE_SEQUENTIAL   base_model.model.model.layers.3.mlp.down_proj.adapter.down          [size, hidden]
                                   base_model.model.model.layers.3.block_sparse_moe.experts.0.w2.adapter.down     of each expert
    peft_type LLMTUNE_PARALLEL     base_model.model.model.layers.3.mlp.adapter.up_bias                 [hidden], and `scale`
    peft_type LLMTUNE_FUSION       base_model.model.model.layers.3.mlp.down_proj.adapter.0.up          [hidden, size], of each one
                                   base_model.model.model.layers.3.mlp.down_proj.fusion.query          [hidden, hidden]

Matrices lie as torch's do, [out, in]. peft refuses these directories by the name of their type; nothing else reads them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_convert.hf_names import SEGMENT, root_module, tensors
from checkpoints_convert.peft.directory import PeftDirectory, is_number
from checkpoints_convert.peft.whole import whole_name
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

KEY = re.compile(
    r"base_model\.model\.model(\.language_model)?\.(?P<module>layers\.\d+\.[a-z0-9_.]+?)"
    r"\.(adapter(\.(?P<number>\d+))?\.(?P<branch>(down|up)(_bias)?)|fusion\.(?P<head>query|key|value))"
)
SLOT, SLOT_MODULE = "mlp/adapter", "mlp"  # a parallel adapter stands beside the whole MLP
BRANCH, HEADS = ("down", "down_bias", "up", "up_bias"), ("query", "key", "value")
Fields = Mapping[str, np.ndarray]
Place = tuple[int, ...]  # (layer,) or (layer, expert)


@dataclass(frozen=True)
class Branches:
    """By our path, the fields of each branch: [L, ...], of experts [L, E, ...].

    Of a fusion's [L, adapters, ...], and query, key, value. `scales`: of parallel branches, float32 [L].
    """

    fields: Mapping[str, Fields]
    scales: Mapping[str, np.ndarray]


def read(directory: PeftDirectory, config: ModelConfig) -> Branches | None:
    """Every field stacked over all layers. Raises LlmtuneFormatError where a place lacks one; transforms check the shapes."""
    directory.check_fields({"size", "scale", "adapters"}, (), {"non_linearity": ("relu",)})
    places = _places(config)
    found: dict[str, dict[str, dict[tuple[Place, int], np.ndarray]]] = {}
    for key, info in directory.weights.tensors.items():
        if whole_name(key) is not None:
            continue
        match = KEY.fullmatch(key)
        if match is None or match["module"] not in places:
            raise LlmtuneFormatError(f"{info.file}: {key} is no part of a bottleneck adapter of this base model")
        path, place = places[match["module"]]
        field, value = match["branch"] or match["head"], directory.weights.read(key).astype(np.float32)
        number = int(match["number"] or 0)
        found.setdefault(path, {}).setdefault(field, {})[place, number] = value.T  # of a bias, itself
    if not found:
        return None
    fused = directory.settings.get("peft_type") == "LLMTUNE_FUSION"
    whole: dict[str, list[Place]] = {}
    for path, place in places.values():
        whole.setdefault(path, []).append(place)
    fields = {
        path: {f: _stack(directory, path, f, own, whole[path], fused) for f, own in each.items()}
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
    entries = []
    for module, (path, place) in _places(config).items():
        fields = values.fields.get(path, {})
        for field, stack in fields.items():
            numbered = "query" in fields and field in BRANCH
            for number, value in enumerate(stack[place] if numbered else [stack[place]]):
                array = np.ascontiguousarray(value.T, dtype=np.float32)
                inner = f"adapter.{number}" if numbered else "adapter" if field in BRANCH else "fusion"
                name = f"base_model.model.{root_module(config)}.{module}.{inner}.{field}"
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
    own: Mapping[tuple[Place, int], np.ndarray],
    places: Sequence[Place],
    fused: bool,
) -> np.ndarray:
    """The places of one field, [L, ...] or [L, E, ...]; of a fusion's branches [L, adapters, ...]."""
    numbers = range(1 + max(number for _, number in own))
    expected = {(place, number) for place in places for number in numbers}
    if set(own) != expected:
        place, number = sorted(set(own) ^ expected)[0]
        where = ", expert ".join(map(str, place))
        raise LlmtuneFormatError(
            f"{directory.weights.path}: {path} has {field} in {len(own)} places, not in {len(expected)} (layer {where}, "
            f"adapter {number}); it is incomplete, or was made for another base model"
        )
    shapes = {value.shape for value in own.values()}
    if len(shapes) > 1:
        raise LlmtuneFormatError(f"{directory.weights.path}: {path} has {field} of several shapes, {sorted(shapes)}")
    if fused and field in BRANCH:
        return np.stack([np.stack([own[place, number] for number in numbers]) for place in places])
    lead = tuple(last + 1 for last in max(places))
    return np.stack([own[place, 0] for place in sorted(places)]).reshape(*lead, *shapes.pop())


def _places(config: ModelConfig) -> dict[str, tuple[str, Place]]:
    """A module's name below the decoder -> (our path, its place in that stack), in the order of the places."""
    root = f"{root_module(config)}."
    projections = {
        tensor.name.removeprefix(root).removesuffix(".weight"): (tensor.path, tensor.index)
        for tensor in tensors(config)
        if tensor.transposed and tensor.layer is not None and "/router/" not in tensor.path
    }
    slots = {
        f"layers.{layer}.{SLOT_MODULE}": (f"{SEGMENT}/{SLOT}", (layer,)) for layer in range(config.num_hidden_layers)
    }
    return {**projections, **slots}
