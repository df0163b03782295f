"""A training run, as a story read from top to bottom: data, mesh, weights, step, loop, export."""

import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llmtune import pretrained
from llmtune.config import Run
from llmtune.data import RunData, load_data, read_batches
from llmtune.evaluation.perplexity import HeldOut
from llmtune.evaluation.report import write_report
from llmtune.models.decoder import declare
from llmtune.sharding import Devices
from llmtune.training.checkpoint import Checkpoints
from llmtune.training.display import Display, step_status
from llmtune.training.evaluate import Evaluator
from llmtune.training.export import export_run
from llmtune.training.facts import Session, run_facts, session_facts
from llmtune.training.program import Program, build_program
from llmtune.training.run_directory import RunDirectory, claim
from llmtune.training.state import TrainState
from llmtune.training.step import Metrics
from llmtune.training.tracking import open_trackers
from llmtune.training.vocabulary import Vocabulary, describe_vocabulary, settle_vocabulary
from llmtune.training.weights import choose_layout
from llmtune.transforms import combine


@dataclass(frozen=True)
class Summary:
    """What a finished run came to. Held-out figures are None where there is no validation data."""

    directory: Path
    steps: int
    before: HeldOut | None
    after: HeldOut | None
    exports: dict[str, Path]


def train(run: Run, display: Display | None = None, devices: Devices | None = None) -> Summary:
    """Carry out a run, or take it up where its last checkpoint left it, on `devices` (default: all there are).

    Raises LlmtuneError for what a user can mend.
    """
    with display or Display() as display:
        source, vocabulary = settle_vocabulary(run, pretrained.open_source(run.model))
        display.phase("tokenising", total=None)
        data = load_data(run, source.config, source.tokenizer_directory, display.advance)
        steps = data.steps(run)

        _, declared = declare(source.config)
        mesh, strategy = choose_layout(run.sharding, declared, devices)
        directory = claim(run, data.digest, source.digest)

        with jax.set_mesh(mesh):
            display.phase("reading weights", total=source.weight_bytes or None)
            program, state = build_program(run, source, steps, mesh, strategy, display.advance)
            describe(display, run, source, vocabulary, data, program, state)
            directory.begin(run, data.digest, source.digest)

            evaluator = Evaluator(run, source.config, data, program, directory)
            facts = run_facts(run, source, data, steps, state, program)
            with Session(directory, facts, session_facts(program)) as session:
                with Checkpoints(directory.checkpoints, run.checkpoint.keep) as checkpoints:
                    state = resume(directory, checkpoints, state, program, display)
                    session.note(first_step=int(state.step))
                    before = measure("before", state, evaluator, display)
                    state = run_steps(run, data, steps, program, state, evaluator, checkpoints, session, display)
                after = measure("after", state, evaluator, display)

                display.phase("exporting", total=None)
                params = combine(state.trainable, program.frozen)
                adapted = run.adapt is not None
                exports = export_run(directory.export, params, source, vocabulary, adapted=adapted, whole=program.whole)
        write_report(directory.path)
        summary = Summary(directory.path, steps, before, after, exports)
        conclude(display, summary, directory)
        return summary


def run_steps(
    run: Run,
    data: RunData,
    steps: int,
    program: Program,
    state: TrainState,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    session: Session,
    display: Display,
) -> TrainState:
    """The loop itself: one compiled step; the next batch is read and placed while the device computes."""
    first = int(state.step)
    if first >= steps:
        return state
    rows = data.source(run, steps, jax.process_index(), jax.process_count())
    batches = map(program.place, read_batches(rows, first))
    batch: Any = next(batches)
    step, seconds = program.compile(state, batch)
    session.note(compile_seconds=round(seconds, 3))
    display.note(f"compiled the train step in {seconds:.1f} s")
    display.phase("training", total=steps, done=first)

    with open_trackers(evaluator.directory, after=first) as tracker:
        clock = time.perf_counter()
        for number in range(first + 1, steps + 1):
            state, metrics = step(state, program.frozen, batch)
            batch = next(batches, None)
            row = {"step": number, **to_numbers(metrics)}
            row["tokens_per_second"] = row["tokens"] / max(time.perf_counter() - clock, 1e-9)
            if run.evaluate.every is not None and (number % run.evaluate.every == 0 or number == steps):
                held_out = evaluator.held_out(state)
                row |= {} if held_out is None else {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity}
            tracker.log(row)
            display.advance(1, step_status(row))
            if number % run.checkpoint.every == 0 or number == steps:
                checkpoints.save(number, state)
                session.note(last_step=number)
            clock = time.perf_counter()
    return state


def measure(moment: str, state: TrainState, evaluator: Evaluator, display: Display) -> HeldOut | None:
    """Held-out loss and samples before or after; what was measured before an interruption stays."""
    if moment == "before" and int(state.step) > 0:
        return evaluator.recorded(moment)
    display.phase("evaluating", total=None)
    return evaluator.record(moment, state)


def to_numbers(metrics: Metrics) -> dict[str, float | int]:
    """Device scalars as Python numbers; counts of tokens as integers."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    ordered = sorted(values, key=lambda name: (name != "loss", name))
    return {name: int(values[name]) if name.endswith("tokens") else values[name] for name in ordered}


def resume(
    directory: RunDirectory, checkpoints: Checkpoints, state: TrainState, program: Program, display: Display
) -> TrainState:
    """The newest checkpoint's state; the given state where there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return state
    state = checkpoints.restore(step, state, program.mesh)
    display.note(f"resuming after step {step} of {directory.path}")
    return state


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
        + (f"{trained:,} parameters of the adapter train" if run.adapt else f"all {trained:,} parameters train")
    )
    if config.is_text_tower:
        display.note(
            "note: the text tower is trained; the others' tensors are carried through untouched into the export"
        )
    adapted = run.adapt is not None
    for note in (*describe_vocabulary(source, vocabulary, adapted=adapted), *data.notes, *data.look.lines):
        display.note(note)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    display.note(f"devices: {mesh.size} {mesh.devices.flat[0].platform} ({shape}), strategy {program.strategy.name}")
    rows = run.train.batch_size
    extra = -rows % (program.row_multiple * jax.process_count())
    if extra:
        display.note(
            f"note: {extra} empty rows are added to each batch of {rows} to spread it evenly; "
            f"a batch_size of {rows + extra} would cost the same"
        )


def conclude(display: Display, summary: Summary, directory: RunDirectory) -> None:
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
    display.note(f"report: {directory.path / 'report.html'}")
    display.note(f"metrics: {directory.metrics.path}")
    prompt = evaluation["after"]["samples"][0]["prompt"] if evaluation["after"]["samples"] else "Once upon a time"
    display.note(f"try it: {shlex.join([command(), 'generate', str(summary.directory), '--prompt', prompt])}")


def command() -> str:
    """What to type for `llmtune`: its path where a shell would find none, or that of another environment."""
    own = Path(sys.executable).with_name("llmtune")
    found = shutil.which("llmtune")
    if not own.exists() or (found is not None and Path(found) == own):
        return "llmtune"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)
