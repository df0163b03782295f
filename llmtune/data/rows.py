"""Files of rows -> Python objects, each with the place it came from.

Every mistake is named as file:line. jsonl is streamed; a json file holds a list; a txt file is one document.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneDataError
from llmtune.shipped import resolve

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """`where` is file:line, for messages."""

    value: dict[str, Any]
    where: str


def data_files(names: str | Sequence[str]) -> list[Path]:
    """The files a configuration names; all must exist and hold something."""
    paths = [resolve(name) for name in ([names] if isinstance(names, str) else names)]
    for path in paths:
        if not path.is_file():
            raise LlmtuneDataError(
                f"{path}: no such file; data.train and data.validation name jsonl, json or txt files"
            )
        if path.stat().st_size == 0:
            raise LlmtuneDataError(f"{path}: the file is empty")
        if path.suffix.lower() not in READERS:
            raise LlmtuneDataError(f"{path}: {path.suffix or 'no suffix'} is not read so far; {', '.join(READERS)} are")
    return paths


def read_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """All rows of all files, in order."""
    for path in paths:
        try:
            yield from READERS[path.suffix.lower()](path)
        except OSError as error:
            raise LlmtuneDataError(f"{path}: cannot be read ({error.strerror})") from None


def files_digest(paths: Sequence[Path]) -> str:
    """sha256 over the files' contents, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(line.removeprefix(BOM) if number == 1 else line, path, number).strip()
            if text:
                yield _row(_parse(text, path, number), f"{path}:{number}")


def _json(path: Path) -> Iterator[Row]:
    values = _parse(_decode(path.read_bytes().removeprefix(BOM), path), path)
    if not isinstance(values, list):
        raise LlmtuneDataError(
            f"{path}: a list of rows is expected, not {type(values).__name__}; one row per line goes into .jsonl"
        )
    for number, value in enumerate(values, 1):
        yield _row(value, f"{path}: row {number}")


def _txt(path: Path) -> Iterator[Row]:
    yield Row({"text": _decode(path.read_bytes().removeprefix(BOM), path)}, str(path))


READERS = {".jsonl": _jsonl, ".json": _json, ".txt": _txt}


def _decode(raw: bytes, path: Path, line: int = 1) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise LlmtuneDataError(
            f"{path}:{line}: not UTF-8 (there is a byte 0x{raw[error.start]:02x}); convert the file"
        ) from None


def _parse(text: str, path: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise LlmtuneDataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise LlmtuneDataError(f"{path}:{line}: nested too deep to be a row") from None
    except ValueError as error:  # an integer of thousands of digits
        raise LlmtuneDataError(f"{path}:{line}: not valid JSON ({error})") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise LlmtuneDataError(f"{where}: a row is an object of columns, not {type(value).__name__}")
    return Row(value, where)
