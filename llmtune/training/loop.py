"""A training run, as a story read from top to bottom: data, mesh, weights, step, loop, export."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.adapt import changes_codes, has_adapter
from llmtune.config.file import plain
from llmtune.data import RunData, load_data
from llmtune.evaluation.perplexity import HeldOut
from llmtune.evaluation.report import write_report
from llmtune.provenance import Found, Papers, settle_license, write_papers
from llmtune.redaction import redact_tree
from llmtune.sharding import Devices
from llmtune.tracking import require_installed
from llmtune.training.announcements import Summary, conclude, describe
from llmtune.training.checkpoint.checkpoints import Checkpoints
from llmtune.training.checkpoint.retention import Retention
from llmtune.training.continuing import find_earlier, take_over
from llmtune.training.display import Display, step_status
from llmtune.training.divergence import BadSteps
from llmtune.training.early_stopping import Plateau
from llmtune.training.evaluate import Evaluator
from llmtune.training.export import export_run
from llmtune.training.facts import Session, run_facts, session_facts
from llmtune.training.figures import require_figure
from llmtune.training.merging import merge_base, report_merge
from llmtune.training.meter import Meter
from llmtune.training.processes import AllProcesses, highest, is_first, wait_for_all
from llmtune.training.program import Program, build_program, row_multiple
from llmtune.training.run_directory import RunDirectory, claim
from llmtune.training.state import TrainState
from llmtune.training.stopping import Interrupted, Stop
from llmtune.training.trackers import open_trackers
from llmtune.training.vocabulary import settle_vocabulary
from llmtune.training.watchdog import Watchdog
from llmtune.training.weights import choose_layout, declare_base
from llmtune.transforms import combine


def train(
    run: Run,
    display: Display | None = None,
    devices: Devices | None = None,
    stop: Stop | None = None,
    profile: range | None = None,
) -> Summary:
    """Carry out a run, or take it up where its last checkpoint left it, on `devices` (default: all there are).

    `stop`: how it is asked to stop between two steps, which it then saves; `profile`: the steps that are traced. Raises
    LlmtuneError for what a user can mend, and Interrupted once it has stopped.
    """
    stop = stop or Stop()
    with display or Display(None if is_first() else Console(quiet=True)) as display:
        source, vocabulary = settle_vocabulary(run, pretrained.open_source(run.model))
        require_installed(run.tracking.to)
        found = settle_license(
            source.directory, run.model, stated=run.export.license, accepted=run.export.accept_license,
            name=run.export.name, default_name=Path(run.output).name,
        )  # fmt: skip
        _, declared = declare_base(run, source.config)
        mesh, strategy = choose_layout(run.sharding, declared, devices)
        row_multiple(run, mesh, strategy)  # refuses a layout before anything is read
        display.phase("tokenising", total=None)
        data = load_data(run, source.config, source.tokenizer_directory, display.advance, AllProcesses())
        steps = data.steps(run)
        earlier = find_earlier(run, source.digest)
        directory = claim(run, data.digest, source.digest)

        with jax.set_mesh(mesh):
            display.phase("reading weights", total=source.weight_bytes or None)
            program, state = build_program(
                run, source, steps, mesh, strategy, display.advance,
                lambda own: own if earlier is None else take_over(earlier, own, mesh),
            )  # fmt: skip
            describe(display, run, source, vocabulary, data, program, state)
            if earlier is not None:
                display.note(
                    f"continuing from step {earlier.manifest.step} of {earlier.run}: its weights, at step 0 of this run"
                )
            wait_for_all("the directory is claimed")
            if is_first():
                directory.begin(run, data.digest, source.digest)
            wait_for_all("the directory has begun")

            evaluator = Evaluator(run, source.config, data, program, directory)
            facts = run_facts(run, source, data, steps, state, program)
            facts["continued_from"] = earlier.facts if earlier else directory.read_facts().get("continued_from")
            with Session(directory, facts, session_facts(program)) as session:
                with open_checkpoints(run, directory, data, source, session, display) as checkpoints:
                    state = resume(directory, checkpoints, state, program, display)
                    session.note(first_step=int(state.step))
                    before = measure("before", state, evaluator, display)
                    with stop.deferred():
                        state = run_steps(
                            run, data, steps, program, state, evaluator, checkpoints, session, display, stop, profile
                        )
                after = measure("after", state, evaluator, display)

                display.phase("exporting", total=None)
                params = combine(program.exported(state), program.frozen)
                adapted = has_adapter(run.adapt)
                exports = export_run(
                    directory.export, params, source, vocabulary, data, adapted=adapted, whole=program.whole,
                    base=merge_base(run, source), own_base=changes_codes(run.adapt),
                    papers=papers_of(run, directory, found, source.digest),
                )  # fmt: skip
                if run.quantize is not None and "model" in exports:  # else nothing was merged
                    session.note(merge=report_merge(run, source, params, program, data, exports["model"], display))
        summary = Summary(directory.path, steps, before, after, exports)
        if is_first():
            write_report(directory.path)
            conclude(display, data, summary, directory)
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
    stop: Stop,
    profile: range | None,
) -> TrainState:
    """The loop itself: one compiled step; the next batch is read and placed while the device computes.

    Once any process was asked to stop, all save the same step and raise Interrupted.
    """
    first = int(state.step)
    if first >= steps:
        return state
    earlier = evaluator.directory.metrics.rows() if first and run.early_stopping is not None else []
    plateau = Plateau(run.early_stopping, (row for row in earlier if row["step"] <= first))  # cut later, at this step
    if plateau.is_reached:
        return state
    directory = evaluator.directory
    feed = data.feed(run, steps, program.own_rows.tolist(), directory.known_position)
    batches = map(program.place, feed.batches(first))
    batch: Any = next(batches)
    step, seconds = program.compile(state, batch)
    session.note(compile_seconds=round(seconds, 3))
    display.note(f"compiled the train step in {seconds:.1f} s")
    display.phase("training", total=steps, done=first)
    (stopping,) = highest([stop.signal])
    if stopping:
        raise Interrupted(stopping, together=True)

    bad_steps = BadSteps(run.divergence, display.note)
    watchdog = Watchdog(run.safeguards.hang_seconds, evaluator.directory.stacks)
    with open_trackers(run, evaluator.directory, first, display.note, profile) as tracker, watchdog:
        meter = Meter(program.work, data.source_names, feed.figures, directory.metrics.seconds(), session.began)
        for number in range(first + 1, steps + 1):
            state, metrics = step(state, program.frozen, batch)
            batch = next(batches, None)
            row = meter.row(number, metrics)
            watchdog.alive()
            if run.evaluate.every is not None and (number % run.evaluate.every == 0 or number == steps):
                with watchdog.paused():
                    held_out = evaluator.held_out(state)
                row |= {} if held_out is None else {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity}
            directory.note_position(number, feed.position(number))
            tracker.log(row)
            if run.evaluate.samples_every is not None and number % run.evaluate.samples_every == 0:
                with watchdog.paused():
                    evaluator.sample_at(number, state)
            if bad_steps.see(row):
                with watchdog.paused():
                    state = go_back(checkpoints, state, program)
            display.advance(1, step_status(row))
            last = plateau.see(row) or number == steps
            if run.checkpoint.best is not None:
                require_figure("checkpoint.best.metric", run.checkpoint.best.metric, row)
            own = [stop.signal, checkpoints.has_failed(), last]  # a plateau of seconds is each process's own
            stopping, failed, last = highest(own)
            with watchdog.paused():
                if last or stopping:
                    checkpoints.finish(number, state, row)
                elif failed or number % run.checkpoint.every == 0:
                    checkpoints.save(number, state, row)
            if stopping:
                raise Interrupted(stopping, together=True)
            if last:
                break
            meter.start()
    if plateau.is_reached:
        display.note(f"stopped early after step {int(state.step)}: {plateau.reason}")
    return state


def go_back(checkpoints: Checkpoints, state: TrainState, program: Program) -> TrainState:
    """The last checkpoint's weights, moments and schedule, while the data goes on; the given state where there is none."""
    checkpoints.wait()
    restored = checkpoints.restore(state, program.mesh)
    return state if restored is None else replace(restored, step=state.step)


def measure(moment: str, state: TrainState, evaluator: Evaluator, display: Display) -> HeldOut | None:
    """Held-out loss and samples before or after; what was measured before an interruption stays."""
    if moment == "before" and int(state.step) > 0:
        return evaluator.recorded(moment)
    display.phase("evaluating", total=None)
    return evaluator.record(moment, state)


def papers_of(run: Run, directory: RunDirectory, found: Found, base_digest: str) -> Callable[[Path, str], None]:
    """What puts card and provenance beside an export of the run, from what is known of it by then."""

    def write(exported: Path, kind: str) -> None:
        facts = Papers(redact_tree(plain(run)), directory.read_facts(), directory.read_evaluation(), found)
        write_papers(exported, kind, facts, base_digest)

    return write


def open_checkpoints(
    run: Run, directory: RunDirectory, data: RunData, source: pretrained.Source, session: Session, display: Display
) -> Checkpoints:
    """The run's checkpoints, each of which names the data and the base model that it belongs to."""
    return Checkpoints(
        directory.checkpoints,
        Retention(run.checkpoint.keep, run.checkpoint.best),
        {"data": data.digest, "base": source.digest},
        run.checkpoint.retries,
        display.note,
        lambda step: session.note(last_step=step),
    )


def resume(
    directory: RunDirectory, checkpoints: Checkpoints, state: TrainState, program: Program, display: Display
) -> TrainState:
    """The newest good checkpoint's state; the given state where the run has never saved any."""
    restored = checkpoints.restore(state, program.mesh)
    if restored is None:
        directory.require_unsaved()
        return state
    display.note(f"resuming after step {int(restored.step)} of {directory.path}")
    return restored
