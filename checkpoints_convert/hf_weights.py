"""Hugging Face weights in and out: strict about names and shapes, streaming tensor by tensor, straight into shardings."""

import functools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints_convert.hf_config import model_config_to_hf
from checkpoints_convert.hf_multimodal import carried, stored_names, text_tower
from checkpoints_convert.hf_names import Tensor, tensors
from checkpoints_convert.safetensors_reader import WeightDirectory, open_directory
from checkpoints_convert.safetensors_writer import Entry, new_directory, write_json, write_shards
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.weights import path_name

STORED = (np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype("float16"))  # float64 would come back narrowed
SHARD_BYTES = 5_000_000_000
TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template.*"
    r"|tekken\.json|.*\.model|.*\.model\.v\d+.*",
    re.IGNORECASE,
)
COMPANIONS = re.compile(rf"{TOKENIZER.pattern}|generation_config\.json|LICENSE.*|NOTICE.*|USE_POLICY.*", re.IGNORECASE)
VOCABULARY = re.compile(r"tokenizer\.json|tekken\.json|.*\.model|.*\.model\.v\d+.*", re.IGNORECASE)
Progress = Callable[[int], None]
Fetch = Callable[
    [str, tuple[int, ...]], np.ndarray
]  # (our path, place in a stacked weight) -> the matrix [in, out], on the host


def check_tensors(weights: WeightDirectory, config: ModelConfig) -> None:
    """Names and shapes, both ways. Tolerated: a tied head stored again with the same bytes, and old rotary buffers."""
    expected = {tensor.name: tensor.shape for tensor in tensors(config)}
    present = {name: info.shape for name, info in weights.tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in present:
        _check_tied_head(weights, tensors(config)[0].name)
        del present["lm_head.weight"]
    for name in sorted(set(expected) - set(present)):
        raise LlmtuneFormatError(
            f"{weights.path}: the tensor {name} is missing, which config.json asks for ({_count(set(expected) - set(present))})"
        )
    for name in sorted(set(present) - set(expected)):
        raise LlmtuneFormatError(
            f"{weights.tensors[name].file}: the tensor {name} is none of this architecture's "
            f"({_count(set(present) - set(expected))}); does config.json belong to these weights?"
        )
    for name, shape in expected.items():
        info = weights.tensors[name]
        if info.shape != shape:
            raise LlmtuneFormatError(
                f"{info.file}: {name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        if info.dtype not in STORED:
            raise LlmtuneFormatError(
                f"{info.file}: {name} is stored as {info.dtype}; convert it to one of {', '.join(map(str, STORED))}"
            )


def load_params(
    directory: Path, config: ModelConfig, layouts: Any, *, dtype: str | None, progress: Progress = lambda done: None
) -> Any:
    """The parameter tree laid out as `layouts` (a Sharding per weight); each device's part is read from disk by itself."""
    weights = text_tower(open_directory(directory), config)
    check_tensors(weights, config)
    by_path: dict[str, list[Tensor]] = {}
    for tensor in tensors(config):
        by_path.setdefault(tensor.path, []).append(tensor)

    def load(path: tuple[Any, ...], layout: jax.sharding.Sharding) -> jax.Array:
        array = _load_weight(weights, by_path[path_name(path)], layout, dtype)
        jax.block_until_ready(array)  # or the host's copies of several weights wait for the transfer at once
        progress(sum(weights.tensors[t.name].end - weights.tensors[t.name].start for t in by_path[path_name(path)]))
        return array

    return jax.tree_util.tree_map_with_path(load, layouts)


def save_directory(
    path: Path,
    fetch: Fetch,
    config: ModelConfig,
    hf_config: Mapping[str, Any],
    source: Path | None,
    companions: Sequence[Path],
    *,
    dtype: str | None = None,
    stored_dtype: str = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    complete: Callable[[Path], None] = lambda directory: None,
    progress: Progress = lambda done: None,
) -> None:
    """A complete Hugging Face directory: weights, config.json, and the tokenizer and notices that lie in `companions`.

    Each tensor is written in `dtype`; where that is None in the dtype that `source` stores it in, or `stored_dtype`. Files
    of later companions replace those of earlier ones; `complete` is called last, before the directory appears.
    """
    stored = None if source is None else open_directory(source)
    on_disk = {} if stored is None else {name: i.dtype for name, i in text_tower(stored, config).tensors.items()}
    fallback = np.dtype(stored_dtype)
    chosen = {t.name: np.dtype(dtype) if dtype else on_disk.get(t.name, fallback) for t in tensors(config)}
    names = stored_names(["lm_head.weight", *(t.name for t in tensors(config))], stored, config)
    entries = [
        Entry(names[t.name], chosen[t.name], t.shape, functools.partial(_produce, fetch, t, chosen[t.name]))
        for t in tensors(config)
    ]
    if config.tie_word_embeddings and "lm_head.weight" in on_disk:  # the source stores the tied head again: so do we
        embed = entries[0]
        entries.append(Entry(names["lm_head.weight"], embed.dtype, embed.shape, embed.produce))
    entries += carried(stored, config)
    with new_directory(path, sum(entry.nbytes for entry in entries)) as partial:
        write_shards(partial, entries, max_shard_bytes=max_shard_bytes, progress=progress)
        write_json(partial / "config.json", _config_json(config, hf_config, dtype))
        for directory in companions:
            copy_companions(directory, partial)
        complete(partial)


def copy_companions(source: Path, target: Path, which: re.Pattern[str] = COMPANIONS) -> None:
    """Tokenizer, generation config, chat template and licence files (or only `which`); never weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and which.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)


def has_tokenizer(directory: Path) -> bool:
    """Whether a vocabulary lies there, in whatever format."""
    return any(file.is_file() and VOCABULARY.fullmatch(file.name) for file in directory.iterdir())


def _config_json(config: ModelConfig, hf_config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The source's own config.json, with its dtype brought up to date where it changed."""
    result = dict(hf_config) or model_config_to_hf(config, dtype or "float32")
    if dtype is not None:
        result["dtype" if "dtype" in result else "torch_dtype"] = dtype
    return result


def _produce(fetch: Fetch, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    array = fetch(tensor.path, tensor.index)
    return np.ascontiguousarray(array.T if tensor.transposed else array).astype(dtype, copy=False)


def _load_weight(
    weights: WeightDirectory, parts: list[Tensor], layout: jax.sharding.Sharding, dtype: str | None
) -> jax.Array:
    shape = parts[0].shape[::-1] if parts[0].transposed else parts[0].shape
    stored = {weights.tensors[tensor.name].dtype for tensor in parts}
    kind = np.dtype(dtype) if dtype else (stored.pop() if len(stored) == 1 else np.dtype(np.float32))
    lead = tuple(last + 1 for last in parts[-1].index)  # (), (layers,) or (layers, experts): parts are in this order
    places, full = np.arange(len(parts)).reshape(lead), (*lead, *shape)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        chosen, inner = places[index[: len(lead)]], index[len(lead) :]
        pieces = (_read_part(weights, parts[number], inner, kind) for number in chosen.flat)
        return _stack(pieces, chosen.shape, kind) if lead else next(pieces)

    cache: dict[Any, np.ndarray] = {}  # devices that hold the same slice share one reading

    def read_once(index: Any) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, full, strict=True))
        if key not in cache:
            cache[key] = read(index)
        return cache[key]

    return jax.make_array_from_callback(full, layout, read_once)


def _read_part(weights: WeightDirectory, tensor: Tensor, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    array = weights.read_slice(tensor.name, index[::-1] if tensor.transposed else index)
    return (array.T if tensor.transposed else array).astype(dtype, copy=False)


def _stack(pieces: Iterator[np.ndarray], lead: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    first = next(pieces)
    out = np.empty((math.prod(lead), *first.shape), dtype)
    out[0] = first
    for k, piece in enumerate(pieces, 1):
        out[k] = piece
    return out.reshape(*lead, *first.shape)


def _check_tied_head(weights: WeightDirectory, table: str) -> None:
    head, embed = (weights.tensors.get(name) for name in ("lm_head.weight", table))
    if head is None or embed is None or head.shape != embed.shape or head.dtype != embed.dtype:
        raise LlmtuneFormatError(
            f"{weights.path}: lm_head.weight differs from the embedding, but config.json ties them"
        )
    rows = max(1, (16 << 20) // max(1, head.shape[-1] * head.dtype.itemsize))
    for start in range(0, head.shape[0], rows):
        piece = (slice(start, start + rows), slice(None))
        if weights.read_slice("lm_head.weight", piece).tobytes() != weights.read_slice(embed.name, piece).tobytes():
            raise LlmtuneFormatError(
                f"{weights.path}: lm_head.weight differs from the embedding, but config.json ties them"
            )


def _count(names: set[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"the first of {len(names)}: {', '.join(sorted(names)[:3])}"
