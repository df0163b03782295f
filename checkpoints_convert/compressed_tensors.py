"""A Hugging Face directory in 8 bits, in the compressed-tensors layout that vLLM and transformers read.

    model.layers.0.mlp.up_proj.weight  bfloat16 [out, in]
      --> model.layers.0.mlp.up_proj.weight        int8 or float8_e4m3fn [out, in]
          model.layers.0.mlp.up_proj.weight_scale  bfloat16 [out, 1]
    config.json: quantization_config {format: int-quantized or float-quantized, one scale per output channel}

Embedding, head, norms and routers stay as they are. Activations are rounded to 8 bits too, token by token as they come
(`dynamic`), by the program that serves the model; the scheme is the one that is known as W8A8 or FP8_DYNAMIC.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_convert.hf_weights import PIECE, SHARD_BYTES, copy_companions
from checkpoints_convert.safetensors_reader import WeightDirectory, open_directory, read_json
from checkpoints_convert.safetensors_writer import Entry, new_directory, write_json, write_shards
from llmtune.errors import LlmtuneFormatError

LINEAR = re.compile(r".*\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.\w+_proj|block_sparse_moe\.experts\.\d+\.w\d)\.weight")
IGNORED = ["lm_head", "re:.*block_sparse_moe.gate$"]


@dataclass(frozen=True)
class Scheme:
    """`kind` and `layout` in the words of compressed-tensors; `largest`: the code of an output's largest magnitude."""

    kind: str
    layout: str
    dtype: np.dtype
    largest: float
    rounded: Callable[[np.ndarray], np.ndarray]


SCHEMES = {
    "int8": Scheme("int", "int-quantized", np.dtype(np.int8), 127.0, np.rint),
    "fp8": Scheme("float", "float-quantized", np.dtype(ml_dtypes.float8_e4m3fn), 448.0, lambda scaled: scaled),
}


def quantise_directory(
    source: Path, target: Path, scheme: str, progress: Callable[[int], None] = lambda done: None
) -> int:
    """Write `target`, complete or not at all; gives the number of matrices that are kept in 8 bits."""
    weights, config, form = open_directory(source), read_json(source / "config.json"), SCHEMES[scheme]
    if "quantization_config" in config:
        raise LlmtuneFormatError(f"{source}/config.json: it is quantised already; export the 16-bit model")
    entries, matrices = [], 0
    for name, info in weights.tensors.items():
        shape = tuple(info.shape)
        if LINEAR.fullmatch(name) is None:
            entries.append(Entry(name, info.dtype, shape, functools.partial(_rows, weights, name)))
            continue
        matrices += 1
        codes, scale = (functools.partial(own, weights, name, form) for own in (_codes, _scale))
        entries.append(Entry(name, form.dtype, shape, codes))
        entries.append(Entry(f"{name}_scale", info.dtype, (shape[0], 1), scale))
    if not matrices:
        raise LlmtuneFormatError(f"{source}: none of its tensors has the name of a matrix of a layer")
    with new_directory(target, sum(entry.nbytes for entry in entries)) as partial:
        write_shards(partial, entries, max_shard_bytes=SHARD_BYTES, progress=progress)
        write_json(partial / "config.json", {**config, "quantization_config": _described(form)})
        copy_companions(source, partial)
    return matrices


def _described(form: Scheme) -> dict[str, Any]:
    common = {"num_bits": 8, "type": form.kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": form.layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": IGNORED,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _rows(weights: WeightDirectory, name: str) -> Iterator[np.ndarray]:
    """The tensor, a run of rows at a time."""
    shape = weights.tensors[name].shape
    step = max(1, PIECE // max(1, int(np.prod(shape[1:], dtype=np.int64)) * 4))
    for first in range(0, shape[0], step):
        yield weights.read_slice(name, (slice(first, min(first + step, shape[0])), *(slice(0, n) for n in shape[1:])))


def _scales(rows: np.ndarray, form: Scheme) -> np.ndarray:
    """One for each row, rounded to the dtype in which it is stored: codes are of what a reader will multiply by."""
    scale = np.abs(rows.astype(np.float32)).max(axis=1, keepdims=True) / form.largest
    return np.where(scale == 0, 1.0, scale).astype(rows.dtype)


def _scale(weights: WeightDirectory, name: str, form: Scheme) -> Iterator[np.ndarray]:
    for rows in _rows(weights, name):
        yield _scales(rows, form)


def _codes(weights: WeightDirectory, name: str, form: Scheme) -> Iterator[np.ndarray]:
    for rows in _rows(weights, name):
        scaled = rows.astype(np.float32) / _scales(rows, form).astype(np.float32)
        yield form.rounded(np.clip(scaled, -form.largest, form.largest)).astype(form.dtype)
