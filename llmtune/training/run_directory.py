"""The directory of a run: what belongs to it, and that nobody else's run is touched.

config.yaml      the resolved configuration; the same one resumes, another is refused with what differs
                 (but for `sharding`, `checkpoint`, `safeguards`, `tracking`, `export`: a run may go on elsewhere)
data.sha256      of the data files; a resumed run must see the same
base.sha256      of the model that it began with (see `pretrained.Source.digest`), which checkpoints of an adapter refer to
metrics.jsonl    an object per step
tensorboard/     the same, for TensorBoard
samples.jsonl    completions of evaluate.prompts, an object per step and prompt
positions.jsonl  of streamed data: where the stream stood after each step
profile/         a trace, where one was asked for
run.json         model, data, sessions: versions, devices, seconds, peak memory
checkpoints/     a directory per step, see llmtune.training.checkpoint
hang.txt         stacks of all threads, of a session that hung
evaluation.json  held-out loss, perplexity and sample generations before and after
held_out/        losses and targets of each held-out example, before.npy and after.npy: what intervals are drawn from
report.html      all of it on one page
export/          model/ (a Hugging Face directory), adapter/ (a PEFT directory), complete only when the run is
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmtune.config import Run
from llmtune.config.file import dump_tree, flat, parse_yaml, plain
from llmtune.data import Position
from llmtune.errors import LlmtuneConfigError, LlmtuneError
from llmtune.evaluation.run_files import read_object, read_sums
from llmtune.redaction import redact_tree
from llmtune.training.files import write_whole, written_plainly
from llmtune.training.metrics import MetricsFile
from llmtune.training.processes import is_first

MAY_CHANGE = (  # sections, or keys of them, that a resumed run may have otherwise
    "sharding",
    "checkpoint",
    "safeguards",
    "tracking",
    "export",
    "optimizer.memory",
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """sha256 of the data files."""
        return self.path / "data.sha256"

    @property
    def base(self) -> Path:
        """sha256 of the base model."""
        return self.path / "base.sha256"

    @property
    def metrics(self) -> MetricsFile:
        """An object per step."""
        return MetricsFile(self.path / "metrics.jsonl")

    @property
    def samples(self) -> MetricsFile:
        """An object per step and prompt."""
        return MetricsFile(self.path / "samples.jsonl")

    @property
    def positions(self) -> MetricsFile:
        """Of streamed data, an object per step: where the stream stood after it."""
        return MetricsFile(self.path / "positions.jsonl")

    def note_position(self, step: int, position: dict[str, Any] | None) -> None:
        """Where the data stand after a step, where that must be known."""
        if position is not None and is_first():
            self.positions.log({"step": step, **position})

    def known_position(self, step: int) -> tuple[int, Position] | None:
        """The last one recorded up to a step."""
        rows = [row for row in self.positions.rows() if row["step"] <= step]
        return (rows[-1]["step"], Position.from_json(rows[-1])) if rows else None

    @property
    def profile(self) -> Path:
        """A trace, for TensorBoard or Perfetto."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """A directory per step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def facts(self) -> Path:
        """What is true of the run beside its curve."""
        return self.path / "run.json"

    @property
    def stacks(self) -> Path:
        """Where a process that hung says where."""
        return self.path / ("hang.txt" if is_first() else f"hang-{jax.process_index()}.txt")

    @property
    def export(self) -> Path:
        """Finished models."""
        return self.path / "export"

    def begin(self, run: Run, data_digest: str, base_digest: str) -> None:
        """Make the directory, and write down what the run is: first of all its configuration, by which it is known."""
        with written_plainly(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(self.config, written_run(run))
            write_whole(self.data, data_digest + "\n")
            write_whole(self.base, base_digest + "\n")
        except BaseException:
            if not any(self.path.iterdir()):
                self.path.rmdir()
            raise

    def read_facts(self) -> dict[str, Any]:
        """What run.json holds; nothing where there is none."""
        return read_object(self.facts)

    def require_unsaved(self) -> None:
        """Refuses a run that has saved steps, of which nothing is left: it would begin anew without a word."""
        saved = max((own.get("last_step") or 0 for own in self.read_facts().get("sessions", [])), default=0)
        if saved:
            raise LlmtuneError(
                f"{self.checkpoints}: the run was saved up to step {saved}, and no checkpoint is there; put them back, or "
                "begin anew with another output"
            )

    def read_evaluation(self) -> dict[str, Any]:
        """`{"before": {...}, "after": {...}}`, as far as measured."""
        return read_object(self.path / "evaluation.json")

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Replace evaluation.json in one step."""
        write_whole(self.path / "evaluation.json", json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")

    def read_held_out(self, moment: str) -> np.ndarray | None:
        """float64 [2, examples]: sums of losses and of targets, as far as measured."""
        return read_sums(self.path / "held_out" / f"{moment}.npy")

    def write_held_out(self, moment: str, sums: np.ndarray) -> None:
        """Replace held_out/<moment>.npy in one step."""
        folder = self.path / "held_out"
        folder.mkdir(exist_ok=True)
        partial = folder / f"{moment}.partial"
        with partial.open("wb") as file:
            np.save(file, sums, allow_pickle=False)
        os.replace(partial, folder / f"{moment}.npy")


def written_run(run: Run) -> str:
    """The configuration as config.yaml holds it: resolved, without secrets."""
    return dump_tree(redact_tree(plain(run)))


def claim(run: Run, data_digest: str, base_digest: str) -> RunDirectory:
    """The run's directory, new or taken up again; nothing is written yet.

    Refuses one that holds something else, another run, or a run on other data or another base model.
    """
    directory = RunDirectory(Path(run.output).absolute())
    if directory.config.exists():
        _refuse_another_run(directory, written_run(run))
        for path, digest, what in (
            (directory.data, data_digest, "other data (its files have"),
            (directory.base, base_digest, f"another base model (the files of {run.model} have"),
        ):
            if path.exists() and path.read_text(encoding="utf-8").strip() != digest:
                raise LlmtuneConfigError(
                    f"output: {directory.path} was begun with {what} changed since); restore the files, or "
                    + _on_purpose(directory, fits=path == directory.data)
                )
        return directory
    if directory.path.exists() and (not directory.path.is_dir() or any(directory.path.iterdir())):
        raise LlmtuneConfigError(
            f"output: {run.output} exists and is no llmtune run (it has no config.yaml); choose an empty or new directory"
        )
    return directory


def _refuse_another_run(directory: RunDirectory, text: str) -> None:
    try:
        written = directory.config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise LlmtuneConfigError(f"output: {directory.config} cannot be read; choose another directory") from None
    there, here = flat(parse_yaml(written, str(directory.config))), flat(parse_yaml(text, "this run"))
    keys = [key for key in {**there, **here} if not {key, key.split(".")[0]} & set(MAY_CHANGE)]
    differing = [key for key in keys if there.get(key) != here.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise LlmtuneConfigError(
            f"output: {directory.path} holds another run ({shown}{more}); give the same configuration, or "
            + _on_purpose(
                directory, fits=not any(key.split(".")[0] in ("model", "adapt", "quantize") for key in differing)
            )
        )


def _on_purpose(directory: RunDirectory, fits: bool) -> str:
    """How to build on a run with something else changed; `fits`: whether its weights are those of the other run."""
    if fits:
        return f"choose another output: with continue_from: {directory.path} it begins with this run's weights"
    merged = directory.export / "model"
    return "choose another output" + (
        f": with model: {merged} it begins with what this run has learnt" if merged.is_dir() else ""
    )
