"""A PEFT adapter directory as it lies on disk: adapter_config.json + adapter_model.safetensors, opened but not understood."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_convert.safetensors_header import read_header
from checkpoints_convert.safetensors_reader import WeightDirectory, read_json
from llmtune.errors import LlmtuneFormatError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {"peft_type", "modules_to_save", "ensure_weight_tying"}  # by what all methods share
HARMLESS = {  # they say nothing about the function that the adapter computes, or the tensors present say it themselves
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip


@dataclass(frozen=True)
class PeftDirectory:
    """`settings`: what adapter_config.json says; `weights`: the tensors, still on disk."""

    path: Path
    settings: Mapping[str, Any]
    weights: WeightDirectory

    def refuse(self, name: str, expected: str) -> LlmtuneFormatError:
        """The error that names a field of adapter_config.json, what it says, and what was expected."""
        shown = name if name.isprintable() else ascii(name)
        given = repr(self.settings.get(name))[:80]
        return LlmtuneFormatError(f"{self.path / CONFIG}: {shown[:80]} is {given}; {expected}")

    def check_fields(self, read: Collection[str], harmless: Collection[str], refused: Mapping[str, tuple]) -> None:
        """Refuse what is set and not understood. `refused`: field -> the values under which it changes nothing."""
        for name, value in self.settings.items():
            unknown = name not in READ and name not in HARMLESS
            unknown = unknown and name not in read and name not in harmless and name not in refused
            if (unknown and value not in (None, False, [], {}, "")) or value not in refused.get(name, (value,)):
                raise self.refuse(name, "that is not supported so far")

    def check_patterns(self, name: str, fits: Any) -> None:
        """A field that maps regular expressions on module names to numbers."""
        patterns = self.settings.get(name) or {}
        if not isinstance(patterns, dict) or not all(_compiles(p) and fits(own) for p, own in patterns.items()):
            raise self.refuse(name, "an object of patterns and numbers is needed")


def open_peft(directory: Path) -> PeftDirectory:
    """Raises LlmtuneFormatError where one of the two files is missing."""
    if not (directory / CONFIG).is_file():
        raise LlmtuneFormatError(f"{directory}: no {CONFIG} there; a PEFT adapter directory is needed")
    settings = read_json(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        pickled = (
            " (adapter_model.bin is a pickle: convert it to safetensors)"
            if (directory / "adapter_model.bin").exists()
            else ""
        )
        raise LlmtuneFormatError(f"{directory}: no {WEIGHTS} there{pickled}")
    return PeftDirectory(directory, settings, WeightDirectory(directory, read_header(directory / WEIGHTS)))


def is_rank(value: Any) -> bool:
    """A positive integer."""
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """A finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Peft's rule: the first pattern that matches the end of the module's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
