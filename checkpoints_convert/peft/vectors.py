"""IA3 and VeRA in PEFT directories: a vector or two for each adapted module.

model.layers.3.self_attn.k_proj.ia3_l         [out, 1]      ->  gain[3] [out], on what comes out
model.layers.3.mlp.down_proj.ia3_l            [1, in]       ->  gain[3] [in], on what goes in
model.layers.3.self_attn.q_proj.vera_lambda_d [rank]        ->  inner[3]
model.layers.3.self_attn.q_proj.vera_lambda_b [out]         ->  outer[3]
base_model.vera_A [rank, largest in], vera_B [largest out, rank]  ->  a, b = their transposes, shared by all
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from checkpoints_convert.hf_names import Tensor, tensors
from checkpoints_convert.peft.directory import PeftDirectory, is_rank
from checkpoints_convert.peft.whole import whole_name
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

IA3_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.(?P<name>ia3_l)(\.\w+)?")
VERA_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.(?P<name>vera_lambda_[bd])(\.\w+)?")
VERA_A, VERA_B = "base_model.vera_A", "base_model.vera_B"


@dataclass(frozen=True)
class Gains:
    """IA3 on one weight: gain [L, in] or [L, out] by `side`, on [L]: 1, or 0 for a layer that is not adapted. float32."""

    gain: np.ndarray
    on: np.ndarray
    side: Literal["in", "out"]


@dataclass(frozen=True)
class VeraValues:
    """a [in, rank], b [rank, out]; of each weight inner [L, rank] and outer [L, out]. float32."""

    a: np.ndarray
    b: np.ndarray
    inner: Mapping[str, np.ndarray]
    outer: Mapping[str, np.ndarray]


def read_ia3(directory: PeftDirectory, config: ModelConfig) -> dict[str, Gains] | None:
    """Gains by our paths; None where the directory has none."""
    directory.check_fields({"feedforward_modules"}, {"init_ia3_weights"}, {"fan_in_fan_out": (False, None)})
    found = _by_module(directory, config, IA3_KEY)
    values = {}
    for path, layers in _weights(config, found).items():
        given = {t.index: directory.weights.read(found[t.name]["ia3_l"]) for t in layers if t.name in found}
        shapes = {own.shape for own in given.values()}
        (out, n_in), places = layers[0].shape, tuple(last + 1 for last in layers[-1].index)
        sides: dict[tuple[int, ...], Literal["in", "out"]] = {(1, n_in): "in", (out, 1): "out"}
        if len(shapes) != 1 or not shapes <= set(sides):
            raise _misfit(directory, path, sorted(shapes)[0], (out, n_in))
        side = sides[shapes.pop()]
        gain, on = np.ones((*places, n_in if side == "in" else out), np.float32), np.zeros(places, np.float32)
        for place, own in given.items():
            gain[place], on[place] = own.astype(np.float32).reshape(-1), 1
        values[path] = Gains(gain, on, side)
    return values or None


def write_ia3(values: Mapping[str, Gains], config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Tensors and settings."""
    entries, modules = [], {"in": [], "out": []}
    for tensor in tensors(config):
        own = values.get(tensor.path)
        if own is None or not own.on[tensor.index]:
            continue
        module, gain = tensor.name.removesuffix(".weight"), own.gain[tensor.index]
        modules[own.side].append(module)
        entries.append(_entry(f"base_model.model.{module}.ia3_l", gain[None] if own.side == "in" else gain[:, None]))
    names = {side: _targets(own, config) for side, own in modules.items()}
    return entries, {
        "target_modules": sorted(names["in"] + names["out"]),
        "feedforward_modules": names["in"],
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }


def read_vera(directory: PeftDirectory, config: ModelConfig) -> VeraValues | None:
    """Projections and vectors; None where the directory has none. Projections that were not saved cannot be had."""
    directory.check_fields(
        {"r", "save_projection"},
        {"projection_prng_key", "vera_dropout", "d_initial", "init_weights"},
        {"fan_in_fan_out": (False, None), "bias": ("none", None)},
    )
    if not is_rank(directory.settings.get("r", 256)):
        raise directory.refuse("r", "a positive integer is needed")
    found = _by_module(directory, config, VERA_KEY)
    if not found:
        return None
    weights = directory.weights
    if VERA_A not in weights.tensors or VERA_B not in weights.tensors:
        raise directory.refuse(
            "save_projection", "its projections are not in the file and come from torch's generator; save them with it"
        )
    a, b = (weights.read(key).astype(np.float32).T for key in (VERA_A, VERA_B))
    inner, outer = {}, {}
    for path, layers in _weights(config, found).items():
        (out, n_in), places = layers[0].shape, tuple(last + 1 for last in layers[-1].index)
        d, own = np.zeros((*places, a.shape[-1]), np.float32), np.zeros((*places, out), np.float32)
        for tensor in layers:
            keys = found.get(tensor.name, {})
            if keys and set(keys) != {"vera_lambda_b", "vera_lambda_d"}:
                raise LlmtuneFormatError(
                    f"{weights.path}: {tensor.name} has only {min(keys)}; the adapter is incomplete"
                )
            if keys:
                read_d, read_b = (weights.read(keys[f"vera_lambda_{name}"]) for name in "db")
                if read_d.shape != a.shape[-1:] or read_b.shape != (out,) or a.shape[0] < n_in or b.shape[1] < out:
                    raise _misfit(directory, tensor.name, read_b.shape, (out, n_in))
                d[tensor.index], own[tensor.index] = read_d, read_b
        inner[path], outer[path] = d, own
    return VeraValues(a, b, inner, outer)


def write_vera(values: VeraValues, config: ModelConfig) -> tuple[list[Entry], dict[str, Any]]:
    """Tensors, the projections among them, and settings."""
    entries, modules = [_entry(VERA_A, values.a.T), _entry(VERA_B, values.b.T)], []
    for tensor in tensors(config):
        if tensor.path not in values.inner or not np.any(values.inner[tensor.path][tensor.index]):
            continue
        module = tensor.name.removesuffix(".weight")
        modules.append(module)
        for name, vectors in (("d", values.inner), ("b", values.outer)):
            entries.append(_entry(f"base_model.model.{module}.vera_lambda_{name}", vectors[tensor.path][tensor.index]))
    return entries, {
        "r": values.a.shape[-1],
        "target_modules": _targets(modules, config),
        "save_projection": True,
        "projection_prng_key": 0,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }


def _by_module(directory: PeftDirectory, config: ModelConfig, pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
    """{Hugging Face weight name: {kind of vector: key}}; a tensor of anything else is an error."""
    known = {tensor.name for tensor in tensors(config) if tensor.transposed}
    found: dict[str, dict[str, str]] = {}
    for key, info in directory.weights.tensors.items():
        if whole_name(key) is not None or key in (VERA_A, VERA_B):
            continue
        match = pattern.fullmatch(key)
        if match is None or f"{match['module']}.weight" not in known:
            raise LlmtuneFormatError(f"{info.file}: {key} adapts a module that this base model does not have")
        found.setdefault(f"{match['module']}.weight", {})[match["name"]] = key
    return found


def _weights(config: ModelConfig, found: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """{our path: its tensors of all layers} of the weights of which any layer was found."""
    by_path: dict[str, list[Tensor]] = {}
    for tensor in tensors(config):
        by_path.setdefault(tensor.path, []).append(tensor)
    return {path: layers for path, layers in by_path.items() if any(tensor.name in found for tensor in layers)}


def _targets(modules: Sequence[str], config: ModelConfig) -> list[str]:
    """Short names where every layer has them, else the modules in full."""
    short = sorted({module.rsplit(".", 1)[-1] for module in modules})
    stacked = [module for module in modules if ".layers." in module]
    complete = len(stacked) == len({own.rsplit(".", 1)[-1] for own in stacked}) * config.num_hidden_layers
    return short if complete and not config.is_text_tower else sorted(modules)


def _entry(key: str, value: np.ndarray) -> Entry:
    array = np.ascontiguousarray(value, dtype=np.float32)
    return Entry(key, array.dtype, array.shape, lambda: array)


def _misfit(directory: PeftDirectory, name: str, shape: Sequence[int], base: Sequence[int]) -> LlmtuneFormatError:
    return LlmtuneFormatError(
        f"{directory.weights.path}: {name} has a vector {list(shape)} where the base is {list(base)}; "
        "the adapter was made for another base model"
    )
