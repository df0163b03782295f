"""The header of a safetensors file: parsed strictly, so that no damaged or hostile file gets past it.

    8 bytes little-endian length n | n bytes of JSON: {name: {dtype, shape, data_offsets}} | data

Accepted is only what the format promises: known dtypes, offsets that tile the data without hole or overlap, sizes that follow
from shape and dtype, and a file that ends where the data does.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmtune.errors import LlmtuneFormatError

HEADER_LIMIT = 25_000_000  # bytes; the largest published models have headers of a few hundred kilobytes
DIMENSIONS = 64  # numpy's limit; a product of more numbers of 63 bits takes its time

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` and `end` are byte offsets into its file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. Raises LlmtuneFormatError on any damage."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(HEADER_LIMIT, size - 8):
                raise LlmtuneFormatError(
                    f"{path}: not a complete safetensors file ({size} bytes, header of {length}); download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise LlmtuneFormatError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_header(text, path, data_start=8 + length, size=size)


def parse_header(text: bytes, path: Path, *, data_start: int, size: int) -> dict[str, TensorInfo]:
    """See `read_header`; `size` is that of the whole file."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise LlmtuneFormatError(f"{path}: its header is not valid JSON ({error}); download it again") from None
    if not isinstance(header, dict):
        raise LlmtuneFormatError(f"{path}: its header is not a JSON object; download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LlmtuneFormatError(f"{path}: its __metadata__ is not an object of texts; download it again")
    tensors = {name: _tensor(name, entry, path, data_start) for name, entry in header.items()}
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != position:
            raise LlmtuneFormatError(
                f"{path}: {tensor.name} leaves a hole or overlaps another tensor; download it again"
            )
        position = tensor.end
    if position != size:
        raise LlmtuneFormatError(
            f"{path}: truncated or padded: its tensors end at byte {position}, the file at {size}; download it again"
        )
    return tensors


def make_header(tensors: list[tuple[str, np.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The 8 length bytes and the JSON, padded with spaces to a multiple of 8; data in the given order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    def refuse(what: str) -> LlmtuneFormatError:
        return LlmtuneFormatError(f"{path}: tensor {name[:200]!r} {what}; download the file again")

    if not name.isprintable() or len(name) > 500:
        raise refuse("has a name that no model has")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"has the unknown dtype {str(dtype)[:50]!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise refuse("has a shape or offsets that are not lists of natural numbers")
    if len(shape) > DIMENSIONS:
        raise refuse(f"has {len(shape)} dimensions")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise refuse(f"occupies {end - start} bytes, which {dtype} {str(shape)[:100]} does not")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), path, data_start + start, data_start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counted = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate name {counted.most_common(1)[0][0][:200]!r}")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")
