"""`MANIFEST.json`: what a step is and what its bytes must be, so that a damaged one is known before anything is built on it.

{"format": 1, "step": 200, "run": {"data": "9f2c...", "base": "77ab..."}, "figures": {"loss": 1.93, "eval_loss": 2.01},
 "arrays": {"trainable/...": {"shape": [4, 64], "dtype": "float32", "digest": "00c0ffee..."}},
 "files": {"state/d/0f3a...": {"bytes": 8192, "sha256": "..."}},
 "sha256": "of all that stands above"}
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

FILE, FORMAT = "MANIFEST.json", 1


class DamagedError(Exception):
    """A step that must not be gone on from: its reason in a few words, for a person."""


@dataclass(frozen=True)
class Manifest:
    """`run`: what the step belongs to; `figures`: the step's row of metrics; `arrays`, `files`: by path name."""

    step: int
    run: dict[str, str]
    figures: dict[str, float]
    arrays: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]

    def to_text(self) -> str:
        """JSON, the last key of which is the hash of the rest."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**body, "sha256": _hash(body)}, indent=1) + "\n"


def read_manifest(text: str | bytes) -> Manifest:
    """Raises DamagedError for anything but what `to_text` wrote."""
    try:
        body = json.loads(text)
        written = body.pop("sha256")
        version = body.pop("format")
        manifest = Manifest(**body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"{FILE} is not what was written") from None
    if written != _hash({"format": version, **body}):
        raise DamagedError(f"{FILE} is not what was written")
    if version != FORMAT:
        raise DamagedError(f"{FILE} has format {version}, this llmtune reads {FORMAT}")
    return manifest


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
