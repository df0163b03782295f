"""Where a model comes from: a directory of weights, something shipped with llmtune, or a preset with random weights.

open_source("path/to/hf_dir")      config and tokenizer directory; weights stay on disk
open_source("mistral-7b-v0.1")     a preset of configs/models: a configuration alone
source.resized(32032, 32000)       the same model with more rows in its vocabulary
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from checkpoints_convert import hf_config
from checkpoints_convert.companions import companion_files
from checkpoints_convert.fingerprint import fingerprint
from checkpoints_convert.safetensors_reader import Weights, open_directory, read_json
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import ModelConfig
from llmtune.shipped import configs_directory, resolve


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
        companion_files(path)  # refused here, not when a run is over and writes its export
        return Source(name, config, read_json(path / "config.json"), path, (path,))
    known = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
    raise LlmtuneConfigError(f"model: {name!r} is neither a directory nor a preset (presets: {known})")
