"""Between Hugging Face's, Meta's and Mistral's layouts: `convert(source, target, plan)`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert import compressed_tensors, layouts
from checkpoints_convert import convert as conversion
from checkpoints_convert.safetensors_reader import read_json
from llmtune.pretrained.source import Progress, Source, open_source
from llmtune.shipped import resolve

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
    return Source(str(own.path), own.config, own.hf, own.path, opened=own.weights)


def export_quantized(source: Path, target: Path, scheme: str, progress: Progress = lambda done: None) -> int:
    """A Hugging Face directory in 8 bits (int8, fp8), as vLLM and transformers read it; gives the matrices so kept."""
    return compressed_tensors.quantise_directory(source, target, scheme, progress)
