"""Torch's files of tensors (`.pth`), read without torch and without running their pickle; written so that torch reads them.

    name.pth  =  zip, nothing compressed:  name/data.pkl   which tensor is which part of which storage
                                           name/data/0     the bytes of storage "0", ...
Reading finds where in the file each tensor's bytes lie; from there on it is a `WeightDirectory` like one of safetensors.
"""

import io
import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert.safetensors_header import TensorInfo
from checkpoints_convert.safetensors_writer import Entry, replacing
from checkpoints_convert.torch_pickle import PICKLE_LIMIT, STORAGES, PickledTensor, read_pickle
from llmtune.errors import LlmtuneFormatError

ALIGNMENT = 64  # of the bytes of a storage within the file, as torch has it
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
ENTRY_LIMIT = 200_000  # records in a file
READ_LIMIT = 50_000_000  # bytes that the directory of a file may have


def read_torch_file(path: Path) -> dict[str, TensorInfo]:
    """Where each tensor of a `.pth` lies. Raises LlmtuneFormatError for anything but a dict of contiguous tensors."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise LlmtuneFormatError(f"{path}: not a regular file")
        with _Bounded(path) as file:
            if file.read(4) != b"PK\3\4":
                raise LlmtuneFormatError(
                    f"{path}: not a torch file of version 1.6 or newer (those are zip archives); older ones are pickles as a "
                    "whole and are not read: load it in a torch that you trust it with, and torch.save it again"
                )
            return _read_archive(file, path)
    except OSError as error:
        raise LlmtuneFormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        struct.error,
        EOFError,
        OverflowError,
    ) as error:
        raise LlmtuneFormatError(
            f"{path}: not a complete torch file ({ascii(str(error))[:200]}); download it again"
        ) from None


def _read_archive(file: "_Bounded", path: Path) -> dict[str, TensorInfo]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        records = {entry.filename: entry for entry in entries}
        if len(records) != len(entries) or len(entries) > ENTRY_LIMIT:
            raise ValueError("two records of one name, or too many records")
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} records data.pkl where one is expected")
        root = pickles[0].removesuffix("data.pkl")
        _check_order(archive, records.get(f"{root}byteorder"), path)
        text = _small_record(archive, records[pickles[0]], PICKLE_LIMIT)
        places: dict[str, tuple[int, int]] = {}
        tensors = {}
        for name, tensor in read_pickle(text, str(path)).items():
            if tensor.storage not in places:
                places[tensor.storage] = _place(file, records.get(f"{root}data/{tensor.storage}"), tensor.storage)
            tensors[name] = _info(name, tensor, *places[tensor.storage], path)
        return tensors


def _info(name: str, tensor: PickledTensor, start: int, size: int, path: Path) -> TensorInfo:
    item, count = tensor.dtype.itemsize, math.prod(tensor.shape)
    if not name.isprintable() or len(name) > 500:
        raise ValueError("a name that no model has")
    if tensor.elements * item != size or tensor.offset + count > tensor.elements:
        raise ValueError(f"{name[:200]}: its storage has {size} bytes, which is not what its description says")
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    if count and any(a != b for a, b, n in zip(tensor.stride, strides, tensor.shape, strict=True) if n > 1):
        raise ValueError(f"{name[:200]}: stored with strides {tensor.stride}; save it contiguous")
    first = start + tensor.offset * item
    return TensorInfo(name, tensor.dtype, tensor.shape, path, first, first + count * item)


def _place(file: "_Bounded", entry: zipfile.ZipInfo | None, key: str) -> tuple[int, int]:
    """(offset, size) of a storage's bytes in the file."""
    if entry is None:
        raise ValueError(f"the storage {key} is missing")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise ValueError(f"the storage {key} is compressed")
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER.size)
    signature, *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
    start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\3\4" or start + entry.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"the storage {key} is cut off")
    return start, entry.file_size


def _check_order(archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None, path: Path) -> None:
    if entry is not None and _small_record(archive, entry, 100) != b"little":
        raise LlmtuneFormatError(f"{path}: its numbers are big-endian; save it on a little-endian machine")


def _small_record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    if entry.file_size > limit or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the record {entry.filename[:100]!a} is too large or compressed")
    with archive.open(entry) as record:
        return record.read(limit)


class _Bounded(io.FileIO):
    """A file of which no more than `READ_LIMIT` bytes are read in one call."""

    def read(self, size: int | None = -1) -> bytes:
        """Refuses what is too much."""
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > READ_LIMIT:
            raise ValueError("its directory of records is larger than any model's")
        return super().read(size) or b""


def write_torch_file(
    path: Path, entries: Sequence[Entry], *, progress: Callable[[int], None] = lambda done: None
) -> None:
    """A file that `torch.load(path, weights_only=True)` reads as a dict of tensors; each is read and written in pieces."""
    root = path.stem
    description = _description((entry.name, np.dtype(entry.dtype), entry.shape) for entry in entries)
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_record(f"{root}/data.pkl"), description)
        archive.writestr(_record(f"{root}/byteorder"), b"little")
        for key, entry in enumerate(entries):
            record = _record(f"{root}/data/{key}")
            record.extra = _padding(file.tell() + LOCAL_HEADER.size + len(record.filename) + ZIP64_EXTRA)
            with archive.open(record, "w", force_zip64=True) as storage:
                for chunk in entry.chunks():
                    storage.write(chunk)
                    progress(len(chunk))
        archive.writestr(_record(f"{root}/version"), b"3\n")


ZIP64_EXTRA = 20  # bytes that zipfile puts before ours into a record's header


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # 1980-01-01: the same tensors give the same bytes


def _padding(start: int) -> bytes:
    """An extra field of unknown kind `FB`, as torch writes, after which the data begins on a multiple of ALIGNMENT."""
    size = -(start + 4) % ALIGNMENT
    return struct.pack("<2sH", b"FB", size) + b"Z" * size


def _description(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """A dict of tensors, each the whole of a storage of its own, keyed "0", "1", ... in the given order."""
    parts = [b"\x80\x02}("]
    for key, (name, dtype, shape) in enumerate(tensors):
        storage = next(storage for storage, kind in STORAGES.items() if kind == dtype)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        parts += [
            _utf8(name), b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"(", _utf8("storage"), b"ctorch\n" + storage.encode() + b"\n", _utf8(str(key)), _utf8("cpu"),
            _integer(math.prod(shape)), b"tQ", _integer(0), _integers(shape), _integers(strides), b"\x89",
            b"ccollections\nOrderedDict\n)R", b"tR",
        ]  # fmt: skip
    return b"".join([*parts, b"u."])


def _utf8(text: str) -> bytes:
    raw = text.encode("utf-8")
    return b"X" + len(raw).to_bytes(4, "little") + raw


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x08" + value.to_bytes(8, "little")


def _integers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
