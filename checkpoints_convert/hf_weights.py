"""Hugging Face weights in and out: strict about names and shapes, streaming tensor by tensor, straight into shardings."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints_convert.companions import copy_companions
from checkpoints_convert.hf_config import model_config_to_hf
from checkpoints_convert.hf_multimodal import carried, stored_names, text_tower
from checkpoints_convert.hf_names import Tensor, tensors
from checkpoints_convert.placing import place, place_encoded
from checkpoints_convert.safetensors_reader import Described, WeightDirectory, Weights, open_directory
from checkpoints_convert.safetensors_writer import Entry, new_directory, take_part, write_json, write_shards
from checkpoints_convert.stacks import depths, in_stacks
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.weights import Quantized, is_operator, path_name

STORED = (np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype("float16"))  # float64 would come back narrowed
SHARD_BYTES = 5_000_000_000
PIECE = 4 * 1024 * 1024  # bytes cast at a time
Progress = Callable[[int], None]
Fetch = Callable[
    [str, tuple[int, ...]], np.ndarray
]  # (our path, place in a stacked weight) -> the matrix [in, out], on the host


def check_tensors(weights: Weights, config: ModelConfig) -> None:
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
    _check_halves([weights.tensors[name] for name in expected])


def open_weights(directory: Path, config: ModelConfig) -> WeightDirectory:
    """The directory's tensors that make up the model, under the names of its modules."""
    return text_tower(open_directory(directory), config)


def load_params(
    weights: Weights,
    config: ModelConfig,
    declared: Any,
    layouts: Any,
    *,
    dtype: str | None,
    progress: Progress = lambda done: None,
) -> Any:
    """The parameter tree laid out as `layouts` (a NamedSharding per array); each device's part is read from disk by itself.

    Where a weight is declared as quantised, its layers are encoded as they are read.
    """
    check_tensors(weights, config)
    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=is_operator)
    cut = depths({path_name(path): weight for path, weight in leaves})
    by_path: dict[str, list[Tensor]] = {}
    for tensor in tensors(config):
        own = in_stacks(tensor, cut)
        by_path.setdefault(own.path, []).append(own)

    def load(path: tuple[Any, ...], weight: Any, layout: Any) -> Any:
        parts = by_path[path_name(path)]
        if isinstance(weight, Quantized):
            return place_encoded(weights, parts, weight, layout, _dtype(weights, parts, None), progress)
        return place(weights, parts, layout, _dtype(weights, parts, dtype), progress)

    return jax.tree_util.tree_map_with_path(load, declared, layouts, is_leaf=is_operator)


def stored_matrices(weights: Weights, config: ModelConfig) -> Fetch:
    """Our path and a place in its stack -> the matrix [in, out] as it is stored."""
    by_place = {(tensor.path, tensor.index): tensor for tensor in tensors(config)}

    def fetch(path: str, place: tuple[int, ...]) -> np.ndarray:
        tensor = by_place[path, place]
        array = weights.read_slice(tensor.name, tuple(slice(0, size) for size in tensor.shape))
        return array.T if tensor.transposed else array

    return fetch


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

    Of several processes all call this, and the first writes.
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
    if jax.process_index() > 0:
        return take_part(entries)
    entries += carried(stored, config)
    with new_directory(path, sum(entry.nbytes for entry in entries)) as partial:
        write_shards(partial, entries, max_shard_bytes=max_shard_bytes, progress=progress)
        write_json(partial / "config.json", _config_json(config, hf_config, dtype))
        for directory in companions:
            copy_companions(directory, partial)
        complete(partial)


def _config_json(config: ModelConfig, hf_config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The source's own config.json, with its dtype brought up to date where it changed."""
    result = dict(hf_config) or model_config_to_hf(config, dtype or "float32")
    if dtype is not None:
        result["dtype" if "dtype" in result else "torch_dtype"] = dtype
    return result


def _produce(fetch: Fetch, tensor: Tensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Transposed and cast a run of rows at a time, so that no second copy of the whole is made."""
    array = fetch(tensor.path, tensor.index)
    theirs = array.T if tensor.transposed else array
    rows = max(1, PIECE // max(1, theirs[:1].nbytes))
    for first in range(0, theirs.shape[0], rows):
        yield np.ascontiguousarray(theirs[first : first + rows]).astype(dtype, copy=False)


def _dtype(weights: Weights, parts: list[Tensor], dtype: str | None) -> np.dtype:
    """As asked for; or as stored, float32 where the layers of a weight are stored differently."""
    stored = {weights.tensors[tensor.name].dtype for tensor in parts}
    return np.dtype(dtype) if dtype else (stored.pop() if len(stored) == 1 else np.dtype(np.float32))


def _check_halves(infos: list[Described]) -> None:
    """Float16 and bfloat16 are never mixed by anyone: one tensor of the other kind is bytes taken for what they are not."""
    kinds = [[info for info in infos if info.dtype == kind] for kind in STORED[1:]]
    if all(kinds):
        odd = min(kinds, key=len)[0]
        raise LlmtuneFormatError(
            f"{odd.file}: {odd.name} is stored as {odd.dtype} among tensors of the other 16-bit kind"
        )


def _check_tied_head(weights: Weights, table: str) -> None:
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
