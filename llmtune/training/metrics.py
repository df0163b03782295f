"""`metrics.jsonl`: an object per step, appended as training goes, cut at the restored step on resume."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.evaluation.run_files import read_rows
from llmtune.redaction import redact
from llmtune.training.files import write_whole, written_plainly


@dataclass(frozen=True)
class MetricsFile:
    """Append-only; every line is flushed, so that a killed run leaves whole lines (but perhaps a torn last one)."""

    path: Path

    def log(self, row: dict[str, Any]) -> None:
        """One line: plain numbers and strings by name."""
        with written_plainly(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(redact(json.dumps(row)) + "\n")

    def close(self) -> None:
        """Nothing is held back."""

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines."""
        return read_rows(self.path)

    def cut_after(self, step: int) -> None:
        """Drop what was written after `step`: those updates are about to be done again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def seconds(self) -> float:
        """Spent on the steps that are in it."""
        return sum(row.get("seconds", 0.0) for row in self.rows())
