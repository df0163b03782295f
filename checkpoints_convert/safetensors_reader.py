"""A directory of safetensors, read in bounded pieces: only the bytes of the slice that is asked for.

The file is never mapped whole (a map of a 3 GB file counts 3 GB of resident memory while it is read).
"""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.safetensors_header import TensorInfo, read_header
from llmtune.errors import LlmtuneFormatError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
PIECE = 16 * 1024 * 1024  # bytes read at a time
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class WeightDirectory:
    """The tensors of all shards by name."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        info = self.tensors[name]
        return self.read_slice(name, tuple(slice(None) for _ in info.shape))

    def read_slice(self, name: str, index: Slices) -> np.ndarray:
        """`tensor[index]` (step 1), reading the rows it touches and, of rows, only the columns where they are long."""
        info = self.tensors[name]
        bounds = [part.indices(size)[:2] for part, size in zip(index, info.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], info.dtype)
        if out.size:
            with info.file.open("rb", buffering=0) as file:
                _read_into(file.fileno(), info, bounds, out)
        return out


def open_directory(path: Path) -> WeightDirectory:
    """The weights of a Hugging Face directory: `model.safetensors`, or the shards that its index names."""
    if (path / INDEX).exists():
        return WeightDirectory(path, _indexed(path))
    if (path / SINGLE).exists():
        return WeightDirectory(path, read_header(checked_file(path, SINGLE)))
    present = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if any(name.endswith(PICKLES) for name in present):
        raise LlmtuneFormatError(
            f"{path}: its weights are pickles ({next(n for n in present if n.endswith(PICKLES))}), which can run code when "
            "read; convert them to safetensors (transformers: model.save_pretrained(dir, safe_serialization=True))"
        )
    there = ", ".join(present[:8]) or "nothing"
    raise LlmtuneFormatError(f"{path}: no {SINGLE} and no {INDEX} there (it holds: {there})")


def checked_file(directory: Path, name: str) -> Path:
    """`directory/name`, only if that is a plain name of a regular file that lies inside the directory."""
    path = directory / name
    plain = name.isprintable() and name == os.path.basename(name) and "\\" not in name and len(os.fsencode(name)) < 256
    if not plain or name in ("", ".", ".."):
        raise LlmtuneFormatError(f"{directory / INDEX}: {name[:200]!r} is not the plain name of a file beside it")
    if not path.exists():
        raise LlmtuneFormatError(f"{directory}: the weight file {name} is missing; download it again")
    if not stat.S_ISREG(path.stat().st_mode) or path.resolve().parent not in _homes(directory, path):
        raise LlmtuneFormatError(f"{path}: not a regular file inside {directory}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of at most 25 MB."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise LlmtuneFormatError(f"{path}: not a regular file")
        if found.st_size > 25_000_000:
            raise LlmtuneFormatError(f"{path}: larger than 25 MB; this is no configuration or index")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant, object_pairs_hook=_object)
    except OSError as error:
        raise LlmtuneFormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise LlmtuneFormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise LlmtuneFormatError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _indexed(path: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise LlmtuneFormatError(f"{path / INDEX}: it has no weight_map of tensor names to file names")
    files = {name: checked_file(path, name) for name in sorted(set(weight_map.values()))}
    tensors: dict[str, TensorInfo] = {}
    for file_name, file in files.items():
        for name, info in read_header(file).items():
            if weight_map.get(name) != file_name:
                listed = weight_map.get(name, "no file")
                raise LlmtuneFormatError(f"{file}: it holds {name}, which the index places in {listed}")
            tensors[name] = info
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise LlmtuneFormatError(
            f"{path / INDEX}: it places {missing[0][:200]!r} in {weight_map[missing[0]]}, which does not hold it"
        )
    return tensors


def _homes(directory: Path, path: Path) -> set[Path]:
    """Where a weight file may really lie: in the directory, or in a hub cache's blob store that links lead to."""
    homes = {directory.resolve()}
    snapshot = directory.resolve()
    if path.is_symlink() and snapshot.parent.name == "snapshots":
        homes.add(snapshot.parent.parent / "blobs")
    return homes


def _read_into(file: int, info: TensorInfo, bounds: list[tuple[int, int]], out: np.ndarray) -> None:
    """Fill `out`: all leading axes but the first are taken whole or row by row, whichever reads fewer bytes."""
    item = info.dtype.itemsize
    trailing = all((start, stop) == (0, size) for (start, stop), size in zip(bounds[1:], info.shape[1:], strict=True))
    if len(bounds) <= 1 or trailing:  # one run of bytes
        row = item * int(np.prod(info.shape[1:], dtype=np.int64)) if info.shape else item
        first = bounds[0][0] if bounds else 0
        _read_run(file, info, info.start + first * row, out.reshape(-1).view(np.uint8).data)
        return
    if len(bounds) > 2:
        for k in range(out.shape[0]):
            inner = TensorInfo(
                info.name, info.dtype, info.shape[1:], info.file, _row_start(info, bounds[0][0] + k), info.end
            )
            _read_into(file, inner, bounds[1:], out[k])
        return
    (top, bottom), (left, right) = bounds
    width = info.shape[1] * item
    if (right - left) * item >= 4096:  # long enough that reading only these columns is worth a call per row
        for k in range(bottom - top):
            start = info.start + (top + k) * width + left * item
            _read_run(file, info, start, out[k].view(np.uint8).data)
        return
    rows = max(1, PIECE // width)
    for first in range(top, bottom, rows):
        last = min(first + rows, bottom)
        piece = np.empty((last - first, info.shape[1]), info.dtype)
        _read_run(file, info, info.start + first * width, piece.reshape(-1).view(np.uint8).data)
        out[first - top : last - top] = piece[:, left:right]


def _row_start(info: TensorInfo, row: int) -> int:
    return info.start + row * info.dtype.itemsize * int(np.prod(info.shape[1:], dtype=np.int64))


def _read_run(file: int, info: TensorInfo, start: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        got = os.preadv(file, [target[done : done + PIECE]], start + done)
        if got == 0:
            raise LlmtuneFormatError(f"{info.file}: it ended while {info.name} was read; did it change meanwhile?")
        done += got


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")
