"""From one layout to another, tensor by tensor in bounded pieces, complete or not at all; and the check of what was written.

    convert(Path("Meta-Llama-3-8B"), Path("llama3-8b"), Plan(to="hf"))
Every tensor passes through once: read in pieces, put into the other's order, written. With `verify` the new directory is
opened again before it takes its name, taken back into the layout of the source, and every tensor's digest is compared.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.companions import companion_files, copy_companions
from checkpoints_convert.hf_weights import SHARD_BYTES
from checkpoints_convert.layouts import CONSOLIDATED, PARAMS, Hints, Opened, as_original, disagreement, open_layout
from checkpoints_convert.original_names import split_axes
from checkpoints_convert.original_params import meta_from_hf, mistral_from_hf
from checkpoints_convert.safetensors_writer import Entry, new_directory, write_json, write_shards
from checkpoints_convert.torch_file import write_torch_file
from checkpoints_convert.views import View, cast, part
from llmtune.errors import LlmtuneError, LlmtuneFormatError

Progress = Callable[[int], None]
FILES_LIMIT = 64


@dataclass(frozen=True)
class Plan:
    """What to make. `files`: into how many tensor-parallel files Meta's layout is split. `dtype` None: as stored."""

    to: str = "hf"
    source_layout: str | None = None
    hints: Hints = field(default_factory=Hints)
    max_shard_bytes: int = SHARD_BYTES
    files: int = 1
    dtype: str | None = None


@dataclass(frozen=True)
class Report:
    """What was made; `digest` is the SHA-256 over all tensors' digests where they were compared."""

    source: Opened
    tensors: int
    nbytes: int
    digest: str | None


def convert(
    source: Path,
    target: Path,
    plan: Plan,
    *,
    verify: Callable[[Opened, Opened], None] | None = None,
    begin: Callable[[str, int], None] = lambda name, total: None,
    progress: Progress = lambda done: None,
) -> Report:
    """`begin` is told each phase and its bytes, `progress` the bytes done since. `verify` sees source and result, opened."""
    opened = open_layout(source, plan.source_layout, plan.hints)
    dtype = None if plan.dtype is None else np.dtype(plan.dtype)
    companion_files(source)  # refused before anything is written
    write, nbytes = WRITERS[plan.to](opened, plan, dtype)
    digest = None
    with new_directory(target, nbytes) as partial:
        begin("writing", nbytes)
        write(partial, progress)
        copy_companions(source, partial)
        if verify is not None:
            again = open_layout(partial, plan.to, Hints() if plan.to == "hf" else Hints(like=opened.hf))
            begin("verifying", 2 * opened.own.total_bytes)
            digest = compare(opened, again, dtype, progress)
            verify(opened, again)
    return Report(opened, len((opened.own if opened.layout == plan.to else opened.weights).tensors), nbytes, digest)


def compare(source: Opened, written: Opened, dtype: np.dtype | None, progress: Progress = lambda done: None) -> str:
    """The written tensors, taken back into the source's layout, against the source's own, digest by digest."""
    if source.layout == "hf":
        back = written.own if written.layout == "hf" else written.weights
    else:
        back = as_original(written.weights, written.config, tied_head="output.weight" in source.own.tensors)
    total = hashlib.sha256()
    for name, view in source.own.tensors.items():
        if name not in back.tensors:
            if name == "lm_head.weight" and source.config.tie_word_embeddings:
                continue  # stored again beside the embedding that it equals
            raise LlmtuneFormatError(f"verification failed: the tensor {name} was not written")
        own, other = _digest(cast(view, dtype), progress), _digest(back.tensors[name], progress)
        if own != other:
            raise LlmtuneFormatError(
                f"verification failed: {name} reads back with other bytes than it was given; "
                "nothing is kept; is the disk sound?"
            )
        total.update(f"{name} {own}\n".encode())
    field_name = disagreement(source.config, written.config)
    if field_name is not None:
        raise LlmtuneFormatError(f"verification failed: {field_name} reads back differently")
    return total.hexdigest()


def _digest(view: View, progress: Progress) -> str:
    digest = hashlib.sha256(f"{view.dtype} {view.shape}".encode())
    for piece in view.pieces():
        digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        progress(piece.nbytes)
    return digest.hexdigest()


Write = Callable[[Path, Progress], None]


def _to_hf(opened: Opened, plan: Plan, dtype: np.dtype | None) -> tuple[Write, int]:
    views = opened.own if opened.layout == "hf" else opened.weights
    entries = [_entry(name, cast(view, dtype)) for name, view in views.tensors.items()]
    config = dict(opened.hf)
    if plan.dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = plan.dtype

    def write(partial: Path, progress: Progress) -> None:
        write_shards(partial, entries, max_shard_bytes=plan.max_shard_bytes, progress=progress)
        write_json(partial / "config.json", config)

    return write, _size(entries)


def _to_mistral(opened: Opened, plan: Plan, dtype: np.dtype | None) -> tuple[Write, int]:
    params = mistral_from_hf(opened.config, opened.hf, str(opened.path))
    views = as_original(opened.weights, opened.config, tied_head=False).tensors
    entries = [_entry(name, cast(view, dtype)) for name, view in views.items()]

    def write(partial: Path, progress: Progress) -> None:
        write_shards(partial, entries, max_shard_bytes=plan.max_shard_bytes, single=CONSOLIDATED, progress=progress)
        write_json(partial / PARAMS, params)

    return write, _size(entries)


def _to_meta(opened: Opened, plan: Plan, dtype: np.dtype | None) -> tuple[Write, int]:
    params = meta_from_hf(opened.config, opened.hf, str(opened.path))
    views = as_original(opened.weights, opened.config, tied_head=True).tensors
    if not 1 <= plan.files <= FILES_LIMIT or opened.config.num_key_value_heads % plan.files:
        raise LlmtuneError(
            f"--files {plan.files}: the {opened.config.num_key_value_heads} key-value heads are not split into so many parts"
        )
    files = [
        [_entry(name, cast(_share(view, rank, plan.files), dtype)) for name, view in views.items()]
        for rank in range(plan.files)
    ]

    def write(partial: Path, progress: Progress) -> None:
        for rank, entries in enumerate(files):
            write_torch_file(partial / f"consolidated.{rank:02d}.pth", entries, progress=progress)
        write_json(partial / PARAMS, params)

    return write, sum(map(_size, files))


WRITERS: dict[str, Callable[[Opened, Plan, Any], tuple[Write, int]]] = {
    "hf": _to_hf, "meta": _to_meta, "mistral": _to_mistral,
}  # fmt: skip


def _share(view: View, rank: int, ranks: int) -> View:
    """The part of a tensor that goes into one of the tensor-parallel files."""
    axes = split_axes(view.name)
    if not axes or ranks == 1:
        return view
    size, rest = divmod(view.shape[axes[0]], ranks)
    if rest:
        raise LlmtuneError(
            f"--files {ranks}: {view.name} of shape {list(view.shape)} is not split into so many equal parts"
        )
    return part(view, axes[0], rank * size, (rank + 1) * size)


def _entry(name: str, view: View) -> Entry:
    return Entry(name, view.dtype, view.shape, functools.partial(_ahead, view), view.lies_in)


def _ahead(view: View) -> Iterator[np.ndarray]:
    """The pieces, each read while the one before is written."""
    pieces = view.pieces()
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, pieces, None)
        while (piece := following.result()) is not None:
            following = reader.submit(next, pieces, None)
            yield piece


def _size(entries: list[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)
