"""Which files a configuration means, and their bytes: plain or compressed, never more of them than was asked for.

A name is a file, a directory (all data files below it, by path) or a pattern such as `data/*.jsonl.gz`. Compressed files are
read as streams; one that expands without end is refused, whatever the policy for single rows is.
"""

import bz2
import glob
import gzip
import hashlib
import importlib
import io
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast, final

from llmtune.errors import LlmtuneDataError
from llmtune.shipped import resolve

KINDS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst")
RATIO, ALLOWANCE = 200, 64 << 20  # bytes out per byte in, after the first so many: text never packs so well
MEMORY = 128 << 20  # of a decompressor's window
PIECE, SIP = 1 << 20, 1 << 11


@dataclass(frozen=True)
class DataFile:
    """A file that was read: for reports, and for knowing whether a resumed run sees the same."""

    path: Path
    bytes: int
    sha256: str


def data_files(names: str | Sequence[str]) -> list[Path]:
    """The files that a configuration names; all must exist and hold something."""
    return [path for name in ([names] if isinstance(names, str) else names) for path in _expand(name)]


def kind_of(path: Path) -> str:
    """`.jsonl` of `rows.jsonl.gz`; "" where no reader knows the name."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def open_bytes(path: Path) -> BinaryIO:
    """The file's content as a buffered binary stream. Raises OSError, and LlmtuneDataError for what is missing."""
    packing = path.suffix.lower()
    if packing not in PACKED:
        return cast(BinaryIO, path.open("rb"))
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path, OPENERS[packing](path)), PIECE))


def read_identity(paths: Sequence[Path]) -> list[DataFile]:
    """Size and sha256 of each file as it lies on disk."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append(DataFile(path, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()))
    return found


def files_digest(files: Sequence[DataFile]) -> str:
    """One sha256 for files in their order; one that was not read as a whole counts by its name and its size."""
    known = (file.sha256 or f"{file.path.name}:{file.bytes}" for file in files)
    return hashlib.sha256(" ".join(known).encode()).hexdigest()


def _expand(name: str) -> list[Path]:
    path = resolve(name)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) and not _hidden(p.relative_to(path)))
        if not found:
            raise LlmtuneDataError(f"{path}: no data file lies in this directory ({_known()} are read)")
    elif not path.is_file() and glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise LlmtuneDataError(f"{path}: no file matches this pattern")
    elif not path.is_file():
        raise LlmtuneDataError(f"{path}: no such file; give the path of a file, of a directory, or a pattern")
    else:
        found = [path]
    for file in found:
        if file.stat().st_size == 0:
            raise LlmtuneDataError(f"{file}: the file is empty")
        if not kind_of(file):
            raise LlmtuneDataError(f"{file}: {file.suffix or 'no suffix'} is not read; {_known()} are")
    return found


def _known() -> str:
    return f"{', '.join(KINDS)}, each also with {', '.join(PACKED)}"


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


@final
class _Unpacked(io.RawIOBase):
    """What a decompressor gives, with its errors in our words and a bound on how far it expands."""

    def __init__(self, path: Path, stream: Any):
        self.path, self.stream, self.given = path, stream, 0
        self.limit = max(ALLOWANCE, RATIO * path.stat().st_size)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        try:
            piece = self.stream.read(min(len(buffer), PIECE))
        except Exception as error:  # each library has errors of its own
            if isinstance(error, MemoryError):
                raise
            said = " ".join(str(error).split())[:100] or type(error).__name__
            raise LlmtuneDataError(f"{self.path}: damaged, or not a {self.path.suffix} file ({said})") from None
        self.given += len(piece)
        if self.given > self.limit:
            raise LlmtuneDataError(
                f"{self.path}: it expands to more than {RATIO} times its size, which no data does; unpack it yourself "
                "if it is what it should be"
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """Close the file below too."""
        if not self.closed:
            self.stream.close()
        super().close()


@final
class _Xz(io.RawIOBase):
    """lzma with a bound on its window, which LZMAFile does not offer."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        self.unpack = lzma.LZMADecompressor(memlimit=MEMORY)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; b"" at the end."""
        while True:
            if self.unpack.eof:  # another stream may follow
                rest = self.unpack.unused_data or self.file.read(PIECE)
                if not rest.strip(b"\0"):
                    return b""
                self.unpack = lzma.LZMADecompressor(memlimit=MEMORY)
            else:
                rest = self.file.read(PIECE) if self.unpack.needs_input else b""
                if self.unpack.needs_input and not rest:
                    raise EOFError("the file ends early")
            if piece := self.unpack.decompress(rest, size):
                return piece

    def close(self) -> None:
        """Close the file below too."""
        self.file.close()
        super().close()


@final
class _Zst(io.RawIOBase):
    """zstandard, fed so little at a time that what comes out fits in memory: 4 bytes can mean 128 KiB."""

    def __init__(self, path: Path):
        library = optional("zstandard", path)
        self.new = lambda: library.ZstdDecompressor(max_window_size=MEMORY).decompressobj()
        self.file, self.unpack, self.held = path.open("rb"), self.new(), memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; b"" at the end."""
        while not self.held:
            if self.unpack.eof:  # another frame may follow
                rest = self.unpack.unused_data or self.file.read(SIP)
                if not rest:
                    return b""
                self.unpack = self.new()
            elif not (rest := self.file.read(SIP)):
                raise EOFError("the file ends early")
            self.held = memoryview(self.unpack.decompress(rest))
        piece, self.held = bytes(self.held[:size]), self.held[size:]
        return piece

    def close(self) -> None:
        """Close the file below too."""
        self.file.close()
        super().close()


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": _Xz,
    ".zst": _Zst,
}


def optional(name: str, path: Path) -> Any:
    """A library of the `data` extra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise LlmtuneDataError(
            f"{path}: {path.suffix} files need {name.split('.')[0]}; pip install 'llmtune[data]'"
        ) from None
