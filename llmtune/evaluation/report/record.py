"""A run directory, as the report reads it: finished, still going on, or left behind by an interruption."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.config.file import parse_yaml
from llmtune.errors import LlmtuneError
from llmtune.evaluation.perplexity import HeldOut
from llmtune.evaluation.run_files import read_object, read_rows, read_sums, read_text

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
    tree = parse_yaml(read_text(config), str(config))
    if not isinstance(tree, dict) or not {"model", "output", "data"} <= tree.keys():
        raise LlmtuneError(f"{config}: not the configuration of a run; give the `output` of a run")
    evaluation = read_object(directory / "evaluation.json")
    before, after = (_held_out(directory, evaluation, moment) for moment in MOMENTS)
    facts = read_object(directory / "run.json")
    rows, sampled = (read_rows(directory / name) for name in ("metrics.jsonl", "samples.jsonl"))
    return Record(directory, tree, rows, facts, evaluation, before, after, sampled)


def _held_out(directory: Path, evaluation: dict[str, Any], moment: str) -> HeldOut | None:
    sums, figures = read_sums(directory / "held_out" / f"{moment}.npy"), evaluation.get(moment, {})
    if sums is not None:
        return HeldOut(*sums)
    if "loss" not in figures:
        return None
    tokens = float(figures["tokens"])  # of a run before examples were recorded: one sum, no interval
    return HeldOut(np.array([figures["loss"] * tokens]), np.array([tokens]))
