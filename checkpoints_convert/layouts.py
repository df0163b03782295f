"""A checkpoint directory in whatever layout it has, seen as Hugging Face's: config.json and tensors by their names there.

    hf       config.json   model.safetensors, or shards and their index
    meta     params.json   consolidated.00.pth ...: tensor-parallel files, each with a part of every matrix
    mistral  params.json   consolidated.safetensors, or shards and their index, or consolidated.00.pth ...
Nothing is read but headers; `Opened.weights` are views.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.hf_config import parse_model_config, read_model_config
from checkpoints_convert.hf_multimodal import text_tower
from checkpoints_convert.hf_names import tensors
from checkpoints_convert.hf_weights import check_tensors
from checkpoints_convert.original_names import FREQUENCIES, is_rotated, original_name, split_axes
from checkpoints_convert.original_params import Known, meta_to_hf, mistral_to_hf
from checkpoints_convert.safetensors_reader import INDEX, SINGLE, WeightDirectory, open_directory, read_json
from checkpoints_convert.torch_file import read_torch_file
from checkpoints_convert.views import (
    View,
    ViewDirectory,
    equal,
    half_to_interleaved,
    head_rows,
    interleaved_to_half,
    joined,
    renamed,
    stored,
    whole,
)
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

LAYOUTS = ("hf", "meta", "mistral")
PARAMS, CONSOLIDATED = "params.json", "consolidated.safetensors"
TORCH_FILE = re.compile(r"consolidated\.(\d\d)\.pth")


@dataclass(frozen=True)
class Opened:
    """A checkpoint: `hf` is its config.json, `weights` are its tensors as Hugging Face has them, `own` as its layout has them."""

    layout: str
    path: Path
    hf: dict[str, Any]
    config: ModelConfig
    weights: ViewDirectory
    own: ViewDirectory
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hints:
    """What the user adds to a params.json: the rope factor, or a whole config.json (`like`) that must agree with it."""

    rope_factor: float | None = None
    like: Mapping[str, Any] | None = None


def layout_of(path: Path) -> str:
    """Which layout a directory has; where it has two (Mistral publishes both in one), Hugging Face's."""
    if not path.is_dir():
        raise LlmtuneFormatError(f"{path}: not a directory")
    if (path / "config.json").exists() and ((path / SINGLE).exists() or (path / INDEX).exists()):
        return "hf"
    if (path / PARAMS).exists():
        if (path / CONSOLIDATED).exists() or (path / f"{CONSOLIDATED}.index.json").exists():
            return "mistral"
        return "mistral" if "hidden_dim" in read_json(path / PARAMS) else "meta"
    return "hf"


def open_layout(path: Path, layout: str | None = None, hints: Hints | None = None) -> Opened:
    """Raises LlmtuneFormatError where files, params and tensors do not fit each other exactly."""
    layout, hints = layout or layout_of(path), hints or Hints()
    if layout == "hf":
        if hints.rope_factor is not None or hints.like is not None:
            raise LlmtuneFormatError(
                f"{path}: its config.json says everything; --rope-scaling-factor and --like are for others"
            )
        return _open_hf(path)
    return _open_original(path, layout, hints)


def _open_hf(path: Path) -> Opened:
    config = read_model_config(path)
    weights = open_directory(path)
    text = text_tower(weights, config)
    check_tensors(text, config)
    passed = sorted(name for name in weights.tensors if name.endswith("rotary_emb.inv_freq"))
    own = {name: view for name, view in stored(weights).tensors.items() if name not in passed}
    notes = (f"{passed[0]} and {len(passed) - 1} more rotary buffers are left out",) if passed else ()
    return Opened("hf", path, read_json(path / "config.json"), config, stored(text), ViewDirectory(path, own), notes)


def _open_original(path: Path, layout: str, hints: Hints) -> Opened:
    where = str(path / PARAMS)
    if not (path / PARAMS).exists():
        raise LlmtuneFormatError(f"{path}: no {PARAMS} there, which the {layout} layout needs")
    params = read_json(path / PARAMS)
    views = _original_views(path, layout, params)
    embedding = views.get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LlmtuneFormatError(f"{path}: the tensor tok_embeddings.weight is missing or is no matrix")
    known = Known(str(embedding.dtype), embedding.shape[0], _is_tied(views, hints, path), _factor(params, hints))
    hf = (meta_to_hf if layout == "meta" else mistral_to_hf)(params, known, where)
    config = parse_model_config(hf, None, where)
    if hints.like is not None:
        hf = _agreeing(hf, config, hints.like, where)
        config = parse_model_config(hf, None, where)
    notes = _check_frequencies(views, config)
    weights = _as_hf(path, views, config)
    check_tensors(weights, config)
    return Opened(layout, path, hf, config, weights, ViewDirectory(path, views), notes)


def _original_views(path: Path, layout: str, params: Mapping[str, Any]) -> dict[str, View]:
    files = sorted(name for name in (entry.name for entry in path.iterdir()) if TORCH_FILE.fullmatch(name))
    if layout == "mistral" and not files:
        return dict(stored(open_directory(path, CONSOLIDATED)).tensors)
    if files != [f"consolidated.{number:02d}.pth" for number in range(len(files))] or not files:
        found = ", ".join(files[:8]) or "none"
        raise LlmtuneFormatError(
            f"{path}: consolidated.00.pth, consolidated.01.pth ... are expected without a gap (found: {found})"
        )
    parts = [stored(WeightDirectory(path, read_torch_file(path / file))).tensors for file in files]
    for file, part in zip(files, parts, strict=True):
        odd = sorted(set(part) ^ set(parts[0]))
        if odd:
            raise LlmtuneFormatError(f"{path / file}: {odd[0]} is in it or in {files[0]}, but not in both")
    return {name: _join(name, [part[name] for part in parts], params) for name in parts[0]}


def _join(name: str, parts: list[View], params: Mapping[str, Any]) -> View:
    axes = split_axes(name)
    for part in parts[1:]:
        if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            raise LlmtuneFormatError(
                f"{part.file}: {name} is {part.dtype} {list(part.shape)}, in {parts[0].file.name} {parts[0].dtype} "
                f"{list(parts[0].shape)}"
            )
        if not axes and not equal(part, parts[0]):
            raise LlmtuneFormatError(
                f"{part.file}: {name} differs from that of {parts[0].file.name}; both should be the same"
            )
    if not axes or len(parts) == 1:
        return parts[0]
    if any(axis >= len(parts[0].shape) for axis in axes):
        raise LlmtuneFormatError(f"{parts[0].file}: {name} has shape {list(parts[0].shape)}, a matrix is expected")
    rows_whole = len(axes) == 2 and parts[0].shape[1] != params.get("dim")
    return joined(parts, 1 if rows_whole else axes[0])


def _is_tied(views: Mapping[str, View], hints: Hints, path: Path) -> bool:
    """The head equals the embedding bit by bit, or is not there; a `like` decides where both are possible."""
    head = views.get("output.weight")
    same = head is None or equal(head, views["tok_embeddings.weight"])
    if hints.like is None:
        return same
    wanted = bool(hints.like.get("tie_word_embeddings", False))
    if wanted and not same:
        raise LlmtuneFormatError(f"{path}: output.weight differs from tok_embeddings.weight, but --like ties them")
    return wanted


def _factor(params: Mapping[str, Any], hints: Hints) -> float | None:
    if hints.rope_factor is not None or hints.like is None or not params.get("use_scaled_rope"):
        return hints.rope_factor
    scaling = hints.like.get("rope_parameters") or hints.like.get("rope_scaling") or {}
    return scaling.get("factor")


def _agreeing(hf: dict[str, Any], ours: ModelConfig, like: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`like`, if it says what params.json says."""
    theirs = parse_model_config(like, None, "--like")
    name = disagreement(ours, theirs)
    if name is not None:
        one, other = getattr(ours, name), getattr(theirs, name)
        raise LlmtuneFormatError(
            f"{where}: {name} is {one} there and {other} in --like; they describe different models"
        )
    result = dict(like)
    result["dtype" if "dtype" in result else "torch_dtype"] = hf["torch_dtype"]
    return result


def disagreement(one: ModelConfig, other: ModelConfig) -> str | None:
    """The first field in which two configs describe different functions of the weights; None where they agree."""
    free = {"max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_ids", "pad_token_id"}
    names = [own.name for own in fields(ModelConfig) if own.name not in free]
    return next((name for name in names if _of_weights(one, name) != _of_weights(other, name)), None)


def _of_weights(config: ModelConfig, name: str) -> Any:
    """A field without what only training sees: the coefficients of the router's losses."""
    if name != "experts" or config.experts is None:
        return getattr(config, name)
    return config.experts.num_local_experts, config.experts.num_experts_per_tok


def _check_frequencies(views: dict[str, View], config: ModelConfig) -> tuple[str, ...]:
    """`rope.freqs` is left out, but only where it is what the config says; removes it from `views`."""
    view = views.pop(FREQUENCIES, None)
    if view is None:
        return ()
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    expected = (1.0 / np.float32(config.rope.theta) ** exponents).astype(view.dtype).astype(np.float64)
    found = view.read(whole(view.shape)).astype(np.float64) if view.shape == expected.shape else None
    unit = 2.0**-7 if view.dtype.itemsize == 2 else 2.0**-20
    if found is None or not np.allclose(found, expected, rtol=unit, atol=0):
        raise LlmtuneFormatError(
            f"{view.file}: {FREQUENCIES} differs from what rope_theta {config.rope.theta} gives; which of both is right?"
        )
    return (f"{FREQUENCIES} is left out: it is what rope_theta says",)


def _as_hf(path: Path, views: Mapping[str, View], config: ModelConfig) -> ViewDirectory:
    order, found, left = interleaved_to_half(config.head_dim), {}, set(views)
    for tensor in tensors(config):
        theirs = original_name(tensor.name)
        if theirs is None:
            raise LlmtuneFormatError(f"{path}: this layout has no tensor for {tensor.name}")
        if theirs not in views:
            raise LlmtuneFormatError(f"{path}: the tensor {theirs} is missing, which {PARAMS} asks for")
        view = views[theirs]
        if len(view.shape) != len(tensor.shape) or (is_rotated(tensor.name) and view.shape != tensor.shape):
            raise LlmtuneFormatError(
                f"{view.file}: {theirs} has shape {list(view.shape)}, {PARAMS} asks for {list(tensor.shape)}"
            )
        found[tensor.name] = renamed(head_rows(view, order) if is_rotated(tensor.name) else view, tensor.name)
        left.discard(theirs)
    if config.tie_word_embeddings:
        left.discard("output.weight")
    if left:
        name = min(left)
        raise LlmtuneFormatError(
            f"{views[name].file}: the tensor {name} is none of this architecture's; does {PARAMS} belong to it?"
        )
    return ViewDirectory(path, found)


def as_original(weights: ViewDirectory, config: ModelConfig, *, tied_head: bool) -> ViewDirectory:
    """Hugging Face's tensors as Meta's and Mistral's; `tied_head`: with the head of a tied model written out, as Meta does."""
    order, found = half_to_interleaved(config.head_dim), {}
    for tensor in tensors(config):
        theirs, view = original_name(tensor.name), weights.tensors[tensor.name]
        if theirs is None:
            raise LlmtuneFormatError(f"{weights.path}: {tensor.name} has no place in this layout")
        found[theirs] = renamed(head_rows(view, order) if is_rotated(tensor.name) else view, theirs)
    if config.tie_word_embeddings and tied_head:
        found["output.weight"] = renamed(weights.tensors["model.embed_tokens.weight"], "output.weight")
    return ViewDirectory(weights.path, found)
