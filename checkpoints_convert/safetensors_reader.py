"""A directory of safetensors, read in bounded pieces: only the bytes of the slice that is asked for.

The file is never mapped whole (a map of a 3 GB file counts 3 GB of resident memory while it is read).
"""

import itertools
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoints_convert.safetensors_header import TensorInfo, read_header
from llmtune.errors import LlmtuneFormatError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
PIECE = 16 * 1024 * 1024  # bytes read at a time
Slices = tuple[slice, ...]


class Described(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> np.dtype: ...  # noqa: D102
    @property
    def file(self) -> Path: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102


class Weights(Protocol):
    """Tensors by name, of which slices are read: a `WeightDirectory`, or views of one."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def tensors(self) -> Mapping[str, Described]: ...  # noqa: D102
    @property
    def total_bytes(self) -> int: ...  # noqa: D102
    def read_slice(self, name: str, index: Slices) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class WeightDirectory:
    """The tensors of all shards by name."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        info = self.tensors[name]
        return self.read_slice(name, tuple(slice(None) for _ in info.shape))

    def read_slice(self, name: str, index: Slices) -> np.ndarray:
        """`tensor[index]` (step 1): no byte outside of the slice is read."""
        info = self.tensors[name]
        bounds = [part.indices(size)[:2] for part, size in zip(index, info.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], info.dtype)
        if out.size:
            with info.file.open("rb", buffering=0) as file:
                _read_into(file.fileno(), info, bounds, out)
        return out


def open_directory(path: Path, single: str = SINGLE) -> WeightDirectory:
    """The weights of a Hugging Face directory: `model.safetensors`, or the shards that its index names.

    `single`: another name of the one file; that of the index follows from it.
    """
    index = f"{single}.index.json"
    if (path / index).exists():
        return WeightDirectory(path, _indexed(path, index))
    if (path / single).exists():
        return WeightDirectory(path, read_header(checked_file(path, single)))
    present = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if any(name.endswith(PICKLES) for name in present):
        raise LlmtuneFormatError(
            f"{path}: its weights are pickles ({next(n for n in present if n.endswith(PICKLES))}), which can run code when "
            "read; convert them to safetensors (Meta's consolidated.*.pth with params.json: llmtune convert; others with "
            "transformers: model.save_pretrained(dir, safe_serialization=True))"
        )
    there = ", ".join(present[:8]) or "nothing"
    raise LlmtuneFormatError(f"{path}: no {single} and no {index} there (it holds: {there})")


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


def _indexed(path: Path, index: str) -> dict[str, TensorInfo]:
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise LlmtuneFormatError(f"{path / index}: it has no weight_map of tensor names to file names")
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
            f"{path / index}: it places {missing[0][:200]!r} in {weight_map[missing[0]]}, which does not hold it"
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
    """Fill `out` with exactly the bytes of the slice: one call for each run of them that lies together in the file."""
    whole = [bound == (0, size) for bound, size in zip(bounds, info.shape, strict=True)]
    inner = len(bounds)  # axes from here on are taken whole
    while inner and whole[inner - 1]:
        inner -= 1
    strides = [info.dtype.itemsize * math.prod(info.shape[axis + 1 :]) for axis in range(len(bounds))]
    outer, target = max(0, inner - 1), out.reshape(-1).view(np.uint8).data
    first = info.start + (bounds[outer][0] * strides[outer] if bounds else 0)
    length = len(target) // math.prod(out.shape[:outer])
    for number, corner in enumerate(itertools.product(*(range(*bound) for bound in bounds[:outer]))):
        start = first + sum(index * stride for index, stride in zip(corner, strides, strict=False))
        _read_run(file, info, start, target[number * length : (number + 1) * length])


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
