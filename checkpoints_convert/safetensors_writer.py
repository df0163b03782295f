"""Writing safetensors: header first, tensor by tensor, complete or not at all.

Each file is written under a temporary name, synced and renamed; a directory appears under its own name only when every file in
it is complete.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.safetensors_header import make_header
from checkpoints_convert.safetensors_reader import SINGLE
from llmtune.errors import LlmtuneError

PIECE = 16 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """A tensor to write; `produce` is called when its turn comes, and gives exactly that shape and dtype.

    It may give the tensor whole, or piece by piece: successive runs of its rows, so that none is ever held whole.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray | Iterator[np.ndarray]]
    lies_in: tuple[Path, int] | None = None  # where the very same bytes lie already: (file, offset)

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def chunks(self) -> Iterator[memoryview]:
        """The tensor's bytes in order, a bounded number at a time."""
        produced, rows = self.produce(), 0
        for piece in [produced] if isinstance(produced, np.ndarray) else produced:
            array = np.asarray(piece, order="C")
            whole = isinstance(produced, np.ndarray)
            fits = array.shape == self.shape if whole else array.shape[1:] == self.shape[1:] and array.ndim > 0
            if not fits or array.dtype != self.dtype:
                raise ValueError(f"{self.name}: promised {self.dtype} {self.shape}, got {array.dtype} {array.shape}")
            rows += array.shape[0] if array.ndim else 0
            view = array.reshape(-1).view(np.uint8).data
            for start in range(0, len(view), PIECE):
                yield view[start : start + PIECE]
        if self.shape and rows != self.shape[0]:
            raise ValueError(f"{self.name}: promised {self.shape[0]} rows, got {rows}")


@contextmanager
def new_directory(path: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block succeeds, and vanishes when it does not."""
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LlmtuneError(f"{path}: exists and is not empty; choose another directory or remove it")
    if path == Path.cwd():  # it would be replaced under the feet of whoever stands in it
        raise LlmtuneError(f"{path}: is the current directory; name one that does not exist yet")
    partial = path.with_name(f".{path.name}.partial")
    with _told_plainly(path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial.parent).free
        if free < needed_bytes:
            raise LlmtuneError(
                f"{path}: {_size(needed_bytes)} are needed, {_size(free)} are free; make room, or choose another disk"
            )
        with _alone(partial, path):
            try:
                yield partial
                _sync_directory(partial)
                if path.exists():
                    path.rmdir()
                os.rename(partial, path)
                _sync_directory(path.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


@contextmanager
def _alone(partial: Path, path: Path) -> Iterator[None]:
    """An empty `partial` that no other process writes: what a killed one left is cleared, one at work is not disturbed.

    The lock is on the directory itself and ends with its holder. A file system without locks goes without.
    """
    taken = LlmtuneError(f"{path}: another process is writing it; wait until it is done, or choose another directory")
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError:
            pass
        if not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise taken  # it was completed, and took its name, between the two lines above
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        os.close(handle)


def write_shards(
    directory: Path,
    entries: Sequence[Entry],
    *,
    max_shard_bytes: int,
    single: str = SINGLE,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """`model.safetensors`, or several shards of at most `max_shard_bytes` (but for larger tensors) and their index.

    `single`: another name of the one file; those of shards and index follow from it.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_file(directory / single, shards[0], progress=progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{Path(single).stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, progress=progress)
        weight_map |= {entry.name: name for entry in shard}
    total = sum(entry.nbytes for entry in entries)
    write_json(
        directory / f"{single}.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_file(
    path: Path, entries: Sequence[Entry], *, metadata: dict[str, str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:  # fmt: skip
    """One safetensors file with its tensors in the given order."""
    header = make_header([(e.name, np.dtype(e.dtype), e.shape) for e in entries], metadata or {"format": "pt"})
    with replacing(path) as file:
        file.write(header)
        for entry in entries:
            if entry.lies_in is None or not _copied(file, *entry.lies_in, entry.nbytes, progress):
                for chunk in entry.chunks():
                    file.write(chunk)
                    progress(len(chunk))


def _copied(file: Any, source: Path, offset: int, size: int, progress: Callable[[int], None]) -> bool:
    """Whether the kernel copied the bytes from file to file, which spares reading them; where it cannot, nothing was written."""
    file.flush()
    done = 0
    with source.open("rb", buffering=0) as other:
        while done < size:
            try:
                moved = os.copy_file_range(other.fileno(), file.fileno(), min(PIECE, size - done), offset + done)
            except (AttributeError, OSError):  # not Linux, or not between these disks
                if done:
                    raise
                return False
            if not moved:
                raise LlmtuneError(f"{source}: it ended while it was copied; did it change meanwhile?")
            done += moved
            progress(moved)
    file.seek(0, os.SEEK_END)
    return True


def take_part(entries: Sequence[Entry]) -> None:
    """What every process but the writing one does: a tensor that is spread over them is put together by all, in this order."""
    for entry in entries:
        for _ in entry.chunks():
            pass


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, sorted as given, ended by a newline."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file to write that takes its name when the block succeeds, synced; nothing remains when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _told_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LlmtuneError(
            f"{path}: cannot be written ({error.strerror or error}); nothing is left half-written"
        ) from error


def _size(count: int) -> str:
    """`1.74 MB`: in the largest unit of which there is at least one."""
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= pair[0]), (1.0, "bytes"))
    return f"{count / unit:.2f} {name}" if unit > 1 else f"{count} bytes"


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
