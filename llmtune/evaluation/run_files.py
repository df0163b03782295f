"""Files that a run leaves, as they are read again: by itself when it is taken up, by the report, by the supervisor.

A file that is damaged is named, in one line. What is not there is nothing: {}, [] or None.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.errors import LlmtuneError


def read_object(path: Path) -> dict[str, Any]:
    """One JSON object."""
    return _parse(read_text(path), str(path)) if path.exists() else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A JSON object of each whole line; a killed run may leave a torn last one."""
    lines = read_text(path).split("\n")[:-1] if path.exists() else []
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def read_sums(path: Path) -> np.ndarray | None:
    """float64 [2, examples]: sums of losses and of targets."""
    if not path.exists():
        return None
    try:
        losses, targets = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LlmtuneError(f"{path}: damaged ({error}); delete it to go without intervals") from None
    return np.stack([losses, targets])


def read_text(path: Path) -> str:
    """UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LlmtuneError(f"{path}: damaged (not UTF-8); restore it") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LlmtuneError(f"{where}: damaged (no JSON object); restore it, or delete the file to go without it")
    return value
