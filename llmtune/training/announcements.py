"""What a run says at its beginning and at its end: lines for a person, each true and each enough to act on."""

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.adapt import has_adapter
from llmtune.data import RunData
from llmtune.evaluation.perplexity import HeldOut
from llmtune.training.display import Display
from llmtune.training.program import Program
from llmtune.training.revisions import attention_dropout
from llmtune.training.run_directory import RunDirectory
from llmtune.training.state import TrainState
from llmtune.training.vocabulary import Vocabulary, describe_vocabulary


@dataclass(frozen=True)
class Summary:
    """What a finished run came to. Held-out figures are None where there is no validation data."""

    directory: Path
    steps: int
    before: HeldOut | None
    after: HeldOut | None
    exports: dict[str, Path]


def describe(
    display: Display,
    run: Run,
    source: pretrained.Source,
    vocabulary: Vocabulary,
    data: RunData,
    program: Program,
    state: TrainState,
) -> None:
    """What is about to happen, in a few lines."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    config, mesh = source.config, program.mesh
    display.note(
        f"model: {source.name} ({config.architecture}, {config.num_hidden_layers} layers, hidden {config.hidden_size}); "
        + _what_trains(run, trained)
    )
    if config.is_text_tower:
        display.note(
            "note: the text tower is trained; the others' tensors are carried through untouched into the export"
        )
    adapted = has_adapter(run.adapt)
    for note in (*describe_vocabulary(source, vocabulary, adapted=adapted), *data.notes, *data.look.lines):
        display.note(note)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    display.note(f"devices: {mesh.size} {mesh.devices.flat[0].platform} ({shape}), strategy {program.strategy.name}")
    rate, chip = attention_dropout(run, config), mesh.devices.flat[0].platform
    if rate:
        whose = "attention_dropout of its config.json" if run.regularize.attention_dropout is None else "as configured"
        slower = "" if chip == "cpu" else "; attention takes the reference, as fused kernels drop nothing"
        display.note(f"note: each step leaves out {rate:.3g} of attention's weights ({whose}){slower}")
    steps, warmup = data.steps(run), run.optimizer.warmup_steps
    if warmup >= steps:
        display.note(
            f"note: the learning rate never reaches its peak: optimizer.warmup_steps {warmup} of the run's {steps} steps; give "
            f"fewer, such as {steps // 10}"
        )
    rows = run.train.batch_size
    extra = -rows % program.row_multiple
    if extra:
        display.note(
            f"note: {extra} empty rows are added to each batch of {rows} to spread it evenly; "
            f"a batch_size of {rows + extra} would cost the same"
        )


def _what_trains(run: Run, trained: int) -> str:
    if has_adapter(run.adapt):
        return f"{trained:,} parameters of the adapter train"
    return f"all {trained:,} parameters train" if run.adapt is None else f"{trained:,} of its parameters train"


def conclude(display: Display, data: RunData, summary: Summary, directory: RunDirectory) -> None:
    """Before and after side by side, where everything lies, what to type next."""
    if summary.before is not None and summary.after is not None:
        display.note(
            f"validation perplexity: {summary.before.perplexity:.3f} before, {summary.after.perplexity:.3f} after "
            f"(loss {summary.before.loss:.4f} -> {summary.after.loss:.4f} over {summary.after.tokens:,} tokens)"
        )
    evaluation = directory.read_evaluation()
    pairs = (
        zip(evaluation["before"]["samples"], evaluation["after"]["samples"], strict=True)
        if "before" in evaluation
        else ()
    )
    for before, after in pairs:
        display.note(
            f"\nprompt: {before['prompt']}\n  before: {before['completion']!r}\n  after:  {after['completion']!r}"
        )
    display.note("")
    for kind, path in summary.exports.items():
        display.note(f"{kind}: {path}")
        note = pretrained.form_note(path) if kind == "adapter" else None
        if note is not None:
            display.note(f"note: {note}")
    display.note(f"report: {directory.path / 'report.html'}")
    display.note(f"metrics: {directory.metrics.path}")
    prompts = [sample["prompt"] for sample in evaluation["after"]["samples"]]
    display.note(f"try it: {shlex.join([command(), 'generate', str(summary.directory), *_asked(data, prompts)])}")


def _asked(data: RunData, prompts: list[str]) -> list[str]:
    """Options that ask in the way that the rows did: as a user's turn, as an instruction, or in plain text."""
    if data.template is not None:
        return ["--chat", "--prompt", prompts[0] if prompts else "Who are you?"]
    return ["--prompt", data.plain_prompt(prompts[0]) if prompts else "Once upon a time"]


def command() -> str:
    """What to type for `llmtune`: its path where a shell would find none, or that of another environment."""
    own = Path(sys.executable).with_name("llmtune")
    found = shutil.which("llmtune")
    if not own.exists() or (found is not None and Path(found) == own):
        return "llmtune"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)
