"""The directories of a run's steps: which there are, which are whole, and how one comes to be called damaged.

This module knows files and no arrays: a process that never imports jax can ask it how far a run has come.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneRetryError
from llmtune.training.checkpoint.manifest import FILE, DamagedError, Manifest, read_manifest

PARTIAL, CORRUPT = ".partial", ".corrupt"
THREADS, CHUNK = 4, 1 << 20


def steps_on_disk(directory: Path) -> list[int]:
    """Steps that have their name, the newest first, whole or not."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_symlink() or path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name)[::-1]


def damaged_steps(directory: Path) -> list[str]:
    """Names of what was found damaged earlier."""
    return sorted(path.name for path in directory.iterdir() if CORRUPT in path.name) if directory.is_dir() else []


def verify_step(path: Path) -> Manifest:
    """The manifest of a step whose files are, byte by byte, those that were committed. Raises DamagedError.

    And LlmtuneRetryError where they may not be read: whoever lacks the right to read a step knows nothing against it.
    """
    try:
        if path.is_symlink():
            raise DamagedError("it is a link")
        manifest = read_manifest((path / FILE).read_bytes())
        if manifest.step != int(path.name):
            raise DamagedError(f"it holds step {manifest.step}")
        found = {str(file.relative_to(path)): file for file in _files(path) if file != path / FILE}
        for name in manifest.files.keys() - found.keys():
            with contextlib.suppress(FileNotFoundError):
                (path / name).lstat()  # where it may not be looked for, it is not missing
            raise DamagedError(f"{name} is missing")
        for name in found.keys() - manifest.files.keys():
            raise DamagedError(f"{name} was not written by llmtune")
        if describe_files(path, list(found.values())) != manifest.files:
            raise DamagedError("bytes of its files have changed")
    except FileNotFoundError as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from None
    except PermissionError as error:
        raise _no_right(error) from None
    except OSError as error:
        raise DamagedError(f"it cannot be read ({error.strerror})") from None
    return manifest


def read_step(path: Path) -> Manifest:
    """The manifest of a step that was verified; raises DamagedError, and LlmtuneRetryError where it may not be read."""
    try:
        return read_manifest((path / FILE).read_bytes())
    except PermissionError as error:
        raise _no_right(error) from None
    except OSError as error:
        raise DamagedError(f"{FILE} cannot be read ({error.strerror})") from None


def _no_right(error: PermissionError) -> LlmtuneRetryError:
    return LlmtuneRetryError(f"{error.filename}: {error.strerror}; mend that, and the same command goes on")


def describe_files(path: Path, files: list[Path] | None = None) -> dict[str, dict[str, Any]]:
    """`{"state/manifest.ocdbt": {"bytes": 117, "sha256": ...}}`, read back from disk."""
    files = sorted(_files(path) if files is None else files)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return {str(file.relative_to(path)): own for file, own in zip(files, pool.map(_describe, files), strict=True)}


def _describe(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def make_durable(path: Path) -> None:
    """Fsync of every file and every directory below `path`, and of itself: what a power cut would lose otherwise."""
    for own in [*_files(path), *(folder for folder in path.rglob("*") if folder.is_dir()), path]:
        sync(own)


def sync(path: Path) -> None:
    """Fsync of a file's bytes, or of a directory's names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def quarantine(path: Path) -> Path:
    """Give a damaged step a name that says so; its new path."""
    at = path.with_name(path.name + CORRUPT)
    number = 2
    while at.exists() or at.is_symlink():
        at, number = path.with_name(f"{path.name}{CORRUPT}-{number}"), number + 1
    os.rename(path, at)
    sync(path.parent)
    return at


def hold(directory: Path) -> int | None:
    """Hold the directory until the descriptor is closed, or this process ends however it may; None: another one does."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        return None
    except OSError:  # a file system without locks
        pass
    return opened


def remove_halves(directory: Path) -> None:
    """What saves left that did not come to their end, and steps whose removal did not.

    Threads of a failed save may still be at it for a moment.
    """
    for _ in range(50):
        halves = list(directory.glob(f"*{PARTIAL}*"))
        if not halves:
            return
        for half in halves:
            shutil.rmtree(half, ignore_errors=True)
        time.sleep(0.1 if any(half.exists() for half in halves) else 0.01)


def remove_step(directory: Path, step: int) -> None:
    """In two strokes, so that a step that lost some of its files never has its name."""
    doomed = directory / f"{step}{PARTIAL}-removed"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory / str(step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
