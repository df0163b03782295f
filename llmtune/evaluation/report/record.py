"""A run directory, as the report reads it: finished, still going on, or left behind by an interruption."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.config.file import parse_yaml
from llmtune.errors import LlmtuneError
from llmtune.evaluation.perplexity import HeldOut

Row = dict[str, Any]
MOMENTS = ("before", "after")


@dataclass(frozen=True)
class Record:
    """What is on disk of a run. `facts` (run.json) and `evaluation` may lack anything in a run that has only begun."""

    path: Path
    config: dict[str, Any]
    rows: list[Row]
    facts: dict[str, Any]
    evaluation: dict[str, Any]
    before: HeldOut | None
    after: HeldOut | None
    sampled: list[Row] = field(default_factory=list)  # samples.jsonl: those on the way

    @property
    def name(self) -> str:
        """The directory's."""
        return self.path.name

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """Calls of `llmtune train`, in order."""
        return self.facts.get("sessions", [])

    @property
    def working_sessions(self) -> list[dict[str, Any]]:
        """Those that found steps to do."""
        return [own for own in self.sessions if own.get("first_step", 0) < self.steps]

    @property
    def steps(self) -> int:
        """Updates that the run asks for."""
        return self.facts.get("steps", self.last_step)

    @property
    def last_step(self) -> int:
        """Updates that were done."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def finished(self) -> bool:
        """Whether it came to its end, export included."""
        if not self.sessions:
            return "after" in self.evaluation
        return any(session["outcome"] == "finished" for session in self.sessions)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one metric, where it was measured; float64."""
        pairs = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)  # type: ignore[return-value]

    def names_after(self, prefix: str) -> list[str]:
        """`["gsm8k", "shakespeare"]` of `loss/`: what is measured apart, in the order in which it first comes."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in names]

    def evaluation_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, held-out losses), the measurements before and after included."""
        steps, losses = self.series("eval_loss")
        if self.before is not None:
            steps, losses = np.append(0, steps), np.append(self.before.loss, losses)
        if self.after is not None and (not len(steps) or steps[-1] != self.steps):
            steps, losses = np.append(steps, self.steps), np.append(losses, self.after.loss)
        return steps, losses

    def samples(self, moment: str) -> list[dict[str, str]]:
        """`[{"prompt": ..., "completion": ...}]`."""
        return self.evaluation.get(moment, {}).get("samples", [])


def read_record(path: str | Path) -> Record:
    """Raises LlmtuneError for a directory that is no run, naming the file that is missing or damaged."""
    directory = Path(path).absolute()
    config = directory / "config.yaml"
    if not directory.is_dir():
        raise LlmtuneError(f"{path}: no such directory; give the `output` of a run")
    if not config.is_file():
        raise LlmtuneError(f"{path}: no llmtune run (it has no config.yaml); give the `output` of a run")
    tree = parse_yaml(_text(config), str(config))
    if not isinstance(tree, dict) or not {"model", "output", "data"} <= tree.keys():
        raise LlmtuneError(f"{config}: not the configuration of a run; give the `output` of a run")
    evaluation = _object(directory / "evaluation.json")
    before, after = (_held_out(directory, evaluation, moment) for moment in MOMENTS)
    facts = _object(directory / "run.json")
    rows, sampled = (_rows(directory / name) for name in ("metrics.jsonl", "samples.jsonl"))
    return Record(directory, tree, rows, facts, evaluation, before, after, sampled)


def _held_out(directory: Path, evaluation: dict[str, Any], moment: str) -> HeldOut | None:
    path, figures = directory / "held_out" / f"{moment}.npy", evaluation.get(moment, {})
    if path.exists():
        try:
            losses, targets = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise LlmtuneError(f"{path}: damaged ({error}); delete it to go without intervals") from None
        return HeldOut(losses, targets)
    if "loss" not in figures:
        return None
    tokens = float(figures["tokens"])  # of a run before examples were recorded: one sum, no interval
    return HeldOut(np.array([figures["loss"] * tokens]), np.array([tokens]))


def _rows(path: Path) -> list[Row]:
    """All whole lines; a killed run may leave a torn last one."""
    lines = _text(path).split("\n")[:-1] if path.exists() else []
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _object(path: Path) -> dict[str, Any]:
    return _parse(_text(path), str(path)) if path.exists() else {}


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LlmtuneError(f"{where}: damaged (no JSON object); restore it, or delete the file to go without it")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LlmtuneError(f"{path}: damaged (not UTF-8); restore it") from None
