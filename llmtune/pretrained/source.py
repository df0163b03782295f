"""Base models, read: Hugging Face directories and presets.

source = open_source("path/to/hf_dir")            config and tokenizer directory; weights stay on disk
params = load(source, declared, mesh, strategy)   straight into shardings, tensor by tensor
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from jax.sharding import Mesh

from checkpoints_convert import companions, hf_config, hf_weights
from checkpoints_convert.fingerprint import fingerprint
from checkpoints_convert.safetensors_reader import Weights, open_directory, read_json
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import ModelConfig
from llmtune.sharding import Strategy, placed_by_compiler
from llmtune.shipped import configs_directory, resolve
from llmtune.transforms import (
    resize_vocabulary,
    without_vocabulary_axis,
)
from llmtune.weights import (
    Quantized,
    is_operator,
    materialize,
    shardings,
)

Progress = Callable[[int], None]  # called with the bytes that were read or written since the last call


@dataclass(frozen=True)
class Resize:
    """The vocabulary on disk has `stored` rows; the first `kept` of them stay, and new ones follow."""

    stored: int
    kept: int


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a directory of weights, or (directory None) a preset with random weights.

    `config` says what the model is in this run, its vocabulary resized where `resize` is given; `companions` are the
    directories whose tokenizer and notices go with it, the last one's tokenizer being the model's.
    """

    name: str
    config: ModelConfig
    hf_config: dict[str, Any]
    directory: Path | None
    companions: tuple[Path, ...] = ()
    resize: Resize | None = None
    untied: bool = False  # on disk one table serves both ends; here the head begins as a copy of it
    opened: Weights | None = None  # the weights, where they are open already or not in Hugging Face's layout

    @property
    def tokenizer_directory(self) -> Path | None:
        """Where the model's tokenizer lies, if it has one."""
        return self.companions[-1] if self.companions else None

    def resized(self, size: int, tokens: int) -> "Source":
        """The same model with `size` rows in its vocabulary, of which those from `tokens` on are new."""
        stored = self.config.vocab_size if self.resize is None else self.resize.stored
        return replace(
            self,
            config=replace(self.config, vocab_size=size),
            hf_config=_with_vocabulary(self.hf_config, size),
            resize=Resize(stored, min(stored, size, tokens)),
        )

    def apart(self) -> "Source":
        """The same model with a head of its own, where it was tied to the embedding."""
        if not self.config.tie_word_embeddings:
            return self
        if self.config.is_text_tower:
            raise LlmtuneConfigError(
                f"{self.name}: the head of a text tower cannot be untied; leave its ends as they are"
            )
        config = replace(self.config, tie_word_embeddings=False)
        return replace(self, config=config, hf_config={**self.hf_config, "tie_word_embeddings": False}, untied=True)

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

    def stored_bytes(self) -> dict[str, int]:
        """Bytes on disk by dtype, from the files' headers; empty for a preset."""
        sizes: dict[str, int] = {}
        for info in () if self.directory is None else open_directory(self.directory).tensors.values():
            sizes[str(info.dtype)] = sizes.get(str(info.dtype), 0) + info.end - info.start
        return sizes

    @property
    def digest(self) -> str:
        """sha256 of the model: of its configuration and, of each stored tensor, of a part that no other model shares."""
        weights = "" if self.directory is None else fingerprint(self.directory)
        return hashlib.sha256(f"{json.dumps(self.hf_config, sort_keys=True)} {weights}".encode()).hexdigest()


def _with_vocabulary(config: dict[str, Any], size: int) -> dict[str, Any]:
    """A config.json with another vocab_size, which a multimodal model has in its text part."""
    text = config.get("text_config")
    return {**config, **({"vocab_size": size} if text is None else {"text_config": {**text, "vocab_size": size}})}


def open_source(name: str) -> Source:
    """A Hugging Face directory, something shipped with llmtune (`llmtune:starter`), or a preset of configs/models."""
    path, presets = resolve(name), configs_directory() / "models"
    preset = presets / f"{name}.yaml"
    if "/" not in name and preset.is_file() and not (path / "config.json").exists():
        raw = yaml.safe_load(preset.read_text(encoding="utf-8"))
        return Source(name, hf_config.parse_model_config(raw, None, str(preset)), raw, None)
    if path.is_dir():
        config = hf_config.read_model_config(path)
        companions.companion_files(path)  # refused here, not when a run is over and writes its export
        return Source(name, config, read_json(path / "config.json"), path, (path,))
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
    """The weights of a source, in `dtype` (None: as stored), each device holding its shard. Presets draw from `seed`.

    What `declared` declares as quantised is encoded from the stored numbers, layer by layer.
    """
    if source.untied:
        tied = replace(source, config=replace(source.config, tie_word_embeddings=True), untied=False)
        without = {**declared, "head": {**declared["head"], "kernel": None}}
        params = load(tied, without, mesh, strategy, dtype=dtype, seed=seed, progress=progress)
        with strategy.active():
            head = jax.jit(placed_by_compiler(jnp.transpose, "embed", "vocab"))(params["embed"]["table"])
            kernel = declared["head"]["kernel"]
            head = jax.jit(kernel.encode)(head) if isinstance(kernel, Quantized) else head
        return {**params, "head": {**params["head"], "kernel": head}}
    if source.directory is None:
        return _drawn(declared, mesh, strategy, dtype, seed)
    layouts = shardings(declared, mesh, strategy)  # what does not divide is named before anything is read
    if source.resize is None:
        weights = weights_of(source, source.config)
        return hf_weights.load_params(weights, source.config, declared, layouts, dtype=dtype, progress=progress)
    stored = replace(source.config, vocab_size=source.resize.stored)
    back = resize_vocabulary(tokens=0, size=source.resize.stored).apply(declared, {})
    loose = without_vocabulary_axis(back)
    layouts = shardings(loose, mesh, strategy)
    weights = weights_of(source, stored)
    params = hf_weights.load_params(weights, stored, loose, layouts, dtype=dtype, progress=progress)
    return _resized(params, back, source, mesh, strategy, seed)


def _drawn(declared: Any, mesh: Mesh, strategy: Strategy, dtype: str | None, seed: int) -> Any:
    """Random weights; a quantised one is drawn as its matrix would be, and encoded before the next is drawn."""
    key = jax.random.key(seed)
    arrays = jax.tree.map(lambda w: None if is_operator(w) else w, declared, is_leaf=is_operator)
    given = materialize(arrays, key, mesh, strategy)

    def finish(path: tuple[Any, ...], weight: Any, array: Any) -> Any:
        if not isinstance(weight, Quantized):
            return array if dtype in (None, "float32") else array.astype(dtype)
        alone = functools.reduce(lambda inner, step: {step.key: inner}, reversed(path), weight.matrix)
        return jax.jit(weight.encode)(*jax.tree.leaves(materialize(alone, key, mesh, strategy)))

    return jax.tree_util.tree_map_with_path(finish, declared, given, is_leaf=is_operator)


def weights_of(source: Source, config: ModelConfig) -> Weights:
    """The tensors on disk of a source that is a directory, under the names of a model of that configuration."""
    assert source.directory is not None
    return source.opened or hf_weights.open_weights(source.directory, config)


def _resized(params: Any, declared: Any, source: Source, mesh: Mesh, strategy: Strategy, seed: int) -> Any:
    """The embedding and the head brought to the source's size, and laid out for it; all else as it is."""
    assert source.resize is not None
    transform = resize_vocabulary(tokens=source.resize.kept, size=source.config.vocab_size)
    noise = materialize(transform.init(declared), jax.random.key(seed), mesh, strategy)

    @jax.jit
    def resize(ends: Any, noise: Any) -> Any:
        with strategy.active():
            return transform.apply(ends, noise)

    return {**params, **resize({end: params[end] for end in ("embed", "head")}, noise)}
