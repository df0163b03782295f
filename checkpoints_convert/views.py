"""Tensors as they would be: joined, split, reordered or cast, but read only when and where a slice is asked for.

    Stored     wq of consolidated.00.pth   [2048, 4096]      |
    Stored     wq of consolidated.01.pth   [2048, 4096]      | --> Joined [4096, 4096] --> HeadRows --> q_proj.weight
A view gives any slice of itself by reading the slices below that it is made of, so a tensor of any size passes through in
pieces of bounded size. A tree of views under the names of a layout is a `ViewDirectory`, which reads like a directory of files.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from checkpoints_convert.safetensors_reader import Slices, WeightDirectory
from llmtune.errors import LlmtuneFormatError

PIECE = 4 * 1024 * 1024  # bytes of a tensor that are held at a time


@dataclass(frozen=True)
class View(ABC):
    """A tensor that is not held; `name` and `file` are for errors."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path

    @abstractmethod
    def read(self, index: Slices) -> np.ndarray:
        """`self[index]`, steps of 1."""

    @property
    def nbytes(self) -> int:
        """Size of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[np.ndarray]:
        """The whole in order, as runs of rows of at most about `PIECE` bytes each (but for longer rows)."""
        if not self.shape:
            yield self.read(())
            return
        row = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        rows = max(1, PIECE // row)
        rows = max(self.row_group, rows // self.row_group * self.row_group)
        for first in range(0, self.shape[0], rows):
            yield self.read((slice(first, min(first + rows, self.shape[0])), *whole(self.shape[1:])))

    @property
    def row_group(self) -> int:
        """Rows that are read together anyway."""
        return 1

    @property
    def lies_in(self) -> tuple[Path, int] | None:
        """(file, offset) where its bytes lie in one run, as they are; None where they do not."""
        return None


@final
@dataclass(frozen=True)
class Stored(View):
    """A tensor of a file, there called `key`."""

    weights: WeightDirectory
    key: str

    @property
    def lies_in(self) -> tuple[Path, int] | None:
        """Its own place."""
        return self.file, self.weights.tensors[self.key].start

    def read(self, index: Slices) -> np.ndarray:
        """From disk, these bytes only."""
        return self.weights.read_slice(self.key, index)


@final
@dataclass(frozen=True)
class Cast(View):
    """In another dtype, rounded once; a number beyond its range is an error, not an infinity."""

    inner: View

    @property
    def row_group(self) -> int:
        """Of the inner one."""
        return self.inner.row_group

    def read(self, index: Slices) -> np.ndarray:
        """Cast after reading."""
        array = self.inner.read(index)
        with np.errstate(over="ignore"):
            result = array.astype(self.dtype)
        if self.dtype == np.float16 and bool((np.isinf(result) & np.isfinite(array)).any()):
            raise LlmtuneFormatError(
                f"{self.file}: {self.name} holds numbers beyond the range of float16; choose bfloat16 or float32"
            )
        return result


@final
@dataclass(frozen=True)
class HeadRows(View):
    """Rows reordered within every head: row i of a head is the inner one's row `order[i]` of that head."""

    inner: View
    order: tuple[int, ...]

    @property
    def row_group(self) -> int:
        """A head."""
        return len(self.order)

    def read(self, index: Slices) -> np.ndarray:
        """Reads the heads that the rows belong to."""
        size = len(self.order)
        start, stop, _ = index[0].indices(self.shape[0])
        top = start // size * size
        heads = self.inner.read((slice(top, min(-(-stop // size) * size, self.shape[0])), *index[1:]))
        ordered = heads.reshape(-1, size, *heads.shape[1:])[:, list(self.order)].reshape(heads.shape)
        return ordered[start - top : stop - top]


@final
@dataclass(frozen=True)
class Part(View):
    """A run along one axis, from `start` on."""

    inner: View
    axis: int
    start: int

    @property
    def row_group(self) -> int:
        """Of the inner one."""
        return self.inner.row_group

    def read(self, index: Slices) -> np.ndarray:
        """The inner one's, further along."""
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        moved = slice(self.start + start, self.start + stop)
        return self.inner.read((*index[: self.axis], moved, *index[self.axis + 1 :]))


@final
@dataclass(frozen=True)
class Joined(View):
    """Several, one after the other along an axis."""

    parts: tuple[View, ...]
    axis: int

    def read(self, index: Slices) -> np.ndarray:
        """Every part's share of the slice."""
        bounds = [own.indices(size)[:2] for own, size in zip(index, self.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], self.dtype)
        start, stop = bounds[self.axis]
        at = 0
        for part in self.parts:
            size = part.shape[self.axis]
            first, last = max(start, at), min(stop, at + size)
            if first < last:
                theirs = (*index[: self.axis], slice(first - at, last - at), *index[self.axis + 1 :])
                into = [slice(None)] * len(bounds)
                into[self.axis] = slice(first - start, last - start)
                out[tuple(into)] = part.read(theirs)
            at += size
        return out


def cast(view: View, dtype: np.dtype | None) -> View:
    """In this dtype; the view itself where it has that already (or None is asked for)."""
    return view if dtype is None or view.dtype == dtype else Cast(view.name, view.shape, dtype, view.file, view)


def head_rows(view: View, order: tuple[int, ...]) -> View:
    """See `HeadRows`."""
    return HeadRows(view.name, view.shape, view.dtype, view.file, view, order)


def part(view: View, axis: int, start: int, stop: int) -> View:
    """`view[start:stop]` along this axis."""
    return Part(view.name, _resized(view.shape, axis, stop - start), view.dtype, view.file, view, axis, start)


def joined(parts: Sequence[View], axis: int) -> View:
    """One after the other along this axis."""
    first, total = parts[0], sum(part.shape[axis] for part in parts)
    return Joined(first.name, _resized(first.shape, axis, total), first.dtype, first.file, tuple(parts), axis)


def renamed(view: View, name: str) -> View:
    """The same under another name."""
    return replace(view, name=name)


def interleaved_to_half(head_dim: int) -> tuple[int, ...]:
    """Meta turns neighbours (0, 1), (2, 3) ...; Hugging Face turns halves (0, d/2), (1, d/2 + 1) ...

    The order of a head's rows in Hugging Face's layout, as row numbers of Meta's: all even rows, then all odd ones.
    """
    return (*range(0, head_dim, 2), *range(1, head_dim, 2))


def half_to_interleaved(head_dim: int) -> tuple[int, ...]:
    """The inverse of `interleaved_to_half`."""
    half = head_dim // 2
    return tuple(row // 2 + (row % 2) * half for row in range(head_dim))


@final
@dataclass(frozen=True)
class ViewDirectory:
    """Views by name, read like a `WeightDirectory`."""

    path: Path
    tensors: Mapping[str, View]

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(view.nbytes for view in self.tensors.values())

    def read_slice(self, name: str, index: Slices) -> np.ndarray:
        """`tensor[index]`, steps of 1."""
        return self.tensors[name].read(index)


def stored(weights: WeightDirectory) -> ViewDirectory:
    """A directory's tensors as views."""
    views = {n: Stored(n, info.shape, info.dtype, info.file, weights, n) for n, info in weights.tensors.items()}
    return ViewDirectory(weights.path, views)


def whole(shape: tuple[int, ...]) -> Slices:
    """The index of everything."""
    return tuple(slice(0, size) for size in shape)


def equal(one: View, other: View) -> bool:
    """Whether two tensors are equal bit by bit; read in pieces."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(one.pieces(), other.pieces(), strict=True))


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
