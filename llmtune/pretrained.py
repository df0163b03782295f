"""The one port to the outside: Hugging Face and PEFT directories in and out.

Everything else in llmtune uses these functions; they alone call `checkpoints_convert`, which alone knows other people's tensor
names and file formats.

    source = open_source("path/to/hf_dir")            config and tokenizer directory; weights stay on disk
    params = load(source, declared, mesh, strategy)   straight into shardings, tensor by tensor
    save(path, params, source)                        a Hugging Face directory, merged
    load_adapter(path, config)                        a transform that adds a PEFT adapter
    save_adapter(path, params, source)                a PEFT directory
    convert(source, target, plan)                     between Hugging Face's, Meta's and Mistral's layouts
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from checkpoints_convert import convert as conversion
from checkpoints_convert import hf_config, hf_weights, layouts, peft
from checkpoints_convert.safetensors_reader import Weights, open_directory, read_json
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import ModelConfig
from llmtune.sharding import Strategy
from llmtune.shipped import configs_directory, resolve
from llmtune.transforms import Factors, Transform, lora_from, weights_by_path
from llmtune.weights import LoRA, dense, is_operator, materialize, shardings

Progress = Callable[[int], None]  # called with the bytes that were read or written since the last call


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a directory of weights, or (directory None) a preset with random weights."""

    name: str
    config: ModelConfig
    hf_config: dict[str, Any]
    directory: Path | None
    opened: Weights | None = (
        None  # the directory's weights, where they are open already or not in Hugging Face's layout
    )

    @property
    def elements(self) -> int:
        """Numbers in the weights on disk; 0 for a preset."""
        if self.directory is None:
            return 0
        tensors = (self.opened or open_directory(self.directory)).tensors.values()
        return sum(math.prod(tensor.shape) for tensor in tensors)

    @property
    def weight_bytes(self) -> int:
        """Size of the weights on disk; 0 for a preset."""
        return 0 if self.directory is None else open_directory(self.directory).total_bytes


def open_source(name: str) -> Source:
    """A Hugging Face directory, something shipped with llmtune (`llmtune:starter`), or a preset of configs/models."""
    path, presets = resolve(name), configs_directory() / "models"
    preset = presets / f"{name}.yaml"
    if "/" not in name and preset.is_file() and not (path / "config.json").exists():
        raw = yaml.safe_load(preset.read_text(encoding="utf-8"))
        return Source(name, hf_config.parse_model_config(raw, None, str(preset)), raw, None)
    if path.is_dir():
        return Source(name, hf_config.read_model_config(path), read_json(path / "config.json"), path)
    known = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
    raise LlmtuneConfigError(f"model: {name!r} is neither a directory nor a preset (presets: {known})")


def load(
    source: Source,
    declared: Any,
    mesh: Mesh,
    strategy: Strategy,
    *,
    dtype: str | None = "float32",
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> Any:
    """The weights of a source, in `dtype` (None: as stored), each device holding its shard. Presets draw from `seed`."""
    if source.directory is None:
        params = materialize(declared, jax.random.key(seed), mesh, strategy)
        return params if dtype in (None, "float32") else jax.tree.map(lambda x: x.astype(dtype), params)
    layouts = shardings(declared, mesh, strategy)
    weights = source.opened or open_directory(source.directory)
    return hf_weights.load_params(weights, source.config, layouts, dtype=dtype, progress=progress)


def save(
    path: Path,
    params: Any,
    source: Source,
    *,
    dtype: str | None = None,
    companions: Path | None = None,
    progress: Progress = lambda done: None,
) -> None:
    """A merged Hugging Face directory; config and tokenizer (from `companions`, default: the source) beside the weights.

    Each tensor in `dtype`, or, where that is None, in its dtype on disk (for a preset: in the dtype that it names).
    """
    weights = weights_by_path(params)

    def fetch(name: str, layer: int | None) -> np.ndarray:
        weight = weights[name]
        if layer is not None:
            weight = jax.tree.map(lambda leaf: leaf[layer], weight)
        return np.asarray(jax.device_get(dense(weight) if is_operator(weight) else weight))

    hf_weights.save_directory(
        path,
        fetch,
        source.config,
        source.hf_config,
        source.directory,
        companions or source.directory,
        dtype=dtype,
        stored_dtype=source.hf_config.get("dtype") or source.hf_config.get("torch_dtype") or "float32",
        progress=progress,
    )


def load_adapter(path: str | Path, config: ModelConfig) -> Transform:
    """The transform that adds a PEFT directory's adapter, with its values."""
    adapter = peft.read_adapter(Path(path), config)
    given = {name: Factors(own.a, own.b, own.scale, own.ranks) for name, own in adapter.factors.items()}
    return lora_from(given, rslora=adapter.rslora)


def save_adapter(path: Path, params: Any, source: Source) -> None:
    """A PEFT directory of the adapter in `params`."""
    adapters = {name: weight for name, weight in weights_by_path(params).items() if isinstance(weight, LoRA)}
    if not adapters:
        raise LlmtuneConfigError("save_adapter: this model has no adapter; save() writes the whole model")
    nested = [name for name, weight in adapters.items() if is_operator(weight.base)]
    if nested:
        raise LlmtuneConfigError(f"save_adapter: {nested[0]} carries several adapters; save() writes the merged model")
    factors = {
        name: peft.Factors(np.asarray(w.a), np.asarray(w.b), np.asarray(w.scale), w.ranks)
        for name, w in jax.device_get(adapters).items()
    }
    base = source.name if source.directory is None else str(source.directory.absolute())
    rslora = any(weight.rslora for weight in adapters.values())
    peft.write_adapter(path, factors, source.config, base=base, rslora=rslora)


LAYOUTS = layouts.LAYOUTS


@dataclass(frozen=True)
class Converted:
    """What a conversion made; `digest` is that of all tensors where they were compared."""

    source_layout: str
    tensors: int
    nbytes: int
    digest: str | None
    notes: tuple[str, ...]


def conversion_plan(
    *, to: str, source_layout: str | None, max_shard_bytes: int, files: int, dtype: str | None,
    rope_factor: float | None, like: str | None,
) -> conversion.Plan:  # fmt: skip
    """`like`: a Hugging Face directory, a config.json or a preset whose configuration the source must agree with."""
    if like is None:
        config = None
    elif (path := resolve(like)).is_file():
        config = read_json(path)
    else:
        config = open_source(like).hf_config
    hints = layouts.Hints(rope_factor, config)
    return conversion.Plan(to, source_layout, hints, max_shard_bytes, files, dtype)


def convert(
    source: Path,
    target: Path,
    plan: conversion.Plan,
    *,
    verify: Callable[[Source, Source], None] | None = None,
    begin: Callable[[str, int], None] = lambda name, total: None,
    progress: Progress = lambda done: None,
) -> Converted:
    """Write `target` as `plan` says, complete or not at all; see `checkpoints_convert.convert`."""
    check = None if verify is None else lambda one, other: verify(_opened(one), _opened(other))
    report = conversion.convert(source, target, plan, verify=check, begin=begin, progress=progress)
    own = report.source
    return Converted(own.layout, report.tensors, report.nbytes, report.digest, own.notes)


def _opened(own: layouts.Opened) -> Source:
    return Source(str(own.path), own.config, own.hf, own.path, own.weights)
