"""A training run, as a story read from top to bottom: data, mesh, weights, step, loop, export."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmtune import pretrained
from llmtune.config import Run
from llmtune.data import HostBatch, RunData, load_data, read_batches
from llmtune.errors import LlmtuneConfigError
from llmtune.evaluation.perplexity import HeldOut
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.sharding import Devices, Strategy, axis_size
from llmtune.shipped import resolve
from llmtune.training import samples
from llmtune.training.checkpoint import Checkpoints
from llmtune.training.display import Display, step_status
from llmtune.training.evaluate import Evaluator, recorded
from llmtune.training.export import export_run
from llmtune.training.optimizer import make_optimizer, make_schedule
from llmtune.training.remat import POLICIES
from llmtune.training.run_directory import RunDirectory, claim
from llmtune.training.state import TrainState, init_state
from llmtune.training.step import Metrics, TrainStep, make_eval_step, make_train_step
from llmtune.training.weights import choose_layout, prepare_weights
from llmtune.transforms import combine

OBJECTIVES = {"pretrain": next_token_loss, "sft": next_token_loss}


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
        source = pretrained.open_source(run.model)
        display.phase("tokenising", total=None)
        data = load_data(run, source.config, source.directory, display.advance)
        steps = data.steps(run)

        _, declared = declare(source.config)
        mesh, strategy = choose_layout(run.sharding, declared, devices)
        multiple = row_multiple(run, mesh, strategy)
        directory = claim(run, data.digest)

        with jax.set_mesh(mesh), Checkpoints(directory.checkpoints, run.checkpoint.keep) as checkpoints:
            display.phase("reading weights", total=source.weight_bytes or None)
            weights = prepare_weights(run, source, mesh, strategy, display.advance)
            frozen = weights.frozen
            describe(display, run, source, data, weights.trainable, frozen, mesh, strategy)

            schedule = make_schedule(run.optimizer, steps)
            optimizer = make_optimizer(run.optimizer, schedule)
            state = init_state(weights.trainable, optimizer)
            state = resume(directory, checkpoints, state, mesh, display)

            bind = functools.partial(
                LanguageModel, weights.graphdef, dtype=jnp.dtype(run.train.dtype), remat=POLICIES[run.train.remat]
            )
            objective = OBJECTIVES[run.objective]
            step = make_train_step(bind, objective, optimizer, schedule, strategy, run.train.microbatches)
            place = functools.partial(place_batch, mesh=mesh, strategy=strategy, multiple=multiple)
            evaluator = Evaluator(
                run,
                data.validation,
                jax.jit(make_eval_step(bind, objective, strategy)),
                place,
                lambda params: samples.sample(
                    bind, params, run.evaluate.prompts, data.tokenizer, source.config, mesh, strategy,
                    run.evaluate.max_new_tokens,
                ),
            )  # fmt: skip

            if int(state.step) == 0:
                display.phase("evaluating", total=None)
                before = evaluator.record(directory, "before", state, frozen)
            else:
                before = recorded(directory, "before")

            state = run_steps(run, data, steps, state, frozen, step, place, evaluator, checkpoints, directory, display)
            checkpoints.wait()

            display.phase("evaluating", total=None)
            after = evaluator.record(directory, "after", state, frozen)
            params = combine(state.trainable, frozen)
            display.phase("exporting", total=None)
            tokenizer = None if run.data.tokenizer is None else resolve(run.data.tokenizer)
            exports = export_run(directory.export, params, source, tokenizer=tokenizer, adapted=run.adapt is not None)
        summary = Summary(directory.path, steps, before, after, exports)
        conclude(display, summary, directory)
        return summary


def run_steps(
    run: Run,
    data: RunData,
    steps: int,
    state: TrainState,
    frozen: Any,
    step: TrainStep,
    place: Any,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    directory: RunDirectory,
    display: Display,
) -> TrainState:
    """The loop itself: one compiled step; the next batch is read and placed while the device computes."""
    first = int(state.step)
    if first >= steps:
        return state
    batches = map(place, read_batches(data.source(run, steps, jax.process_index(), jax.process_count()), first))
    compiled, seconds = compile_step(step, state, frozen, batch := next(batches))
    display.note(f"compiled the train step in {seconds:.1f} s")
    display.phase("training", total=steps, done=first)

    clock = time.perf_counter()
    for number in range(first + 1, steps + 1):
        state, metrics = compiled(state, frozen, batch)
        batch = next(batches, None)
        row = {"step": number, **to_numbers(metrics)}
        row["tokens_per_second"] = row["tokens"] / max(time.perf_counter() - clock, 1e-9)
        if run.evaluate.every is not None and (number % run.evaluate.every == 0 or number == steps):
            held_out = evaluator.held_out(state, frozen)
            row |= {} if held_out is None else {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity}
        directory.metrics.append(row)
        display.advance(1, step_status(row))
        if number % run.checkpoint.every == 0 or number == steps:
            checkpoints.save(number, state)
        clock = time.perf_counter()
    return state


def compile_step(step: TrainStep, state: TrainState, frozen: Any, batch: Any) -> tuple[Any, float]:
    """The step compiled ahead of time for exactly these shapes and layouts: it cannot be compiled a second time."""
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    return compiled, time.perf_counter() - start


def to_numbers(metrics: Metrics) -> dict[str, float | int]:
    """Device scalars as Python numbers; counts of tokens as integers."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    ordered = sorted(values, key=lambda name: (name != "loss", name))
    return {name: int(values[name]) if name.endswith("tokens") else values[name] for name in ordered}


def place_batch(batch: HostBatch, *, mesh: Mesh, strategy: Strategy, multiple: int) -> dict[str, jax.Array]:
    """This process's rows of a global batch, filled up with empty rows to a `multiple`, onto the mesh."""
    layout = NamedSharding(mesh, strategy.spec("batch", "seq"))
    extra = -len(batch["tokens"]) % multiple
    filled = {name: np.pad(rows, ((0, extra), (0, 0))) for name, rows in batch.items()}  # segment 0: seen by nobody
    return {name: jax.make_array_from_process_local_data(layout, rows) for name, rows in filled.items()}


def row_multiple(run: Run, mesh: Mesh, strategy: Strategy) -> int:
    """Rows per process must be a multiple of this, for every microbatch to divide over the devices that share it."""
    ways = axis_size(mesh, strategy.spec("batch")[0]) * run.train.microbatches
    if run.train.batch_size % jax.process_count():
        raise LlmtuneConfigError(
            f"train.batch_size: {run.train.batch_size} rows cannot be shared by {jax.process_count()} processes"
        )
    return max(1, ways // jax.process_count())


def resume(
    directory: RunDirectory, checkpoints: Checkpoints, state: TrainState, mesh: Mesh, display: Display
) -> TrainState:
    """The newest checkpoint's state, with metrics cut back to it; the given state where there is none."""
    step = checkpoints.latest_step()
    directory.metrics.cut_after(step or 0)
    if step is None:
        return state
    state = checkpoints.restore(step, state, mesh)
    display.note(f"resuming after step {step} of {directory.path}")
    return state


def describe(
    display: Display,
    run: Run,
    source: pretrained.Source,
    data: RunData,
    trainable: Any,
    frozen: Any,
    mesh: Mesh,
    strategy: Strategy,
) -> None:
    """What is about to happen, in a few lines."""
    trained, kept = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trainable, frozen))
    config = source.config
    display.note(
        f"model: {source.name} ({config.architecture}, {config.num_hidden_layers} layers, hidden {config.hidden_size}); "
        f"{trained:,} of {trained + kept:,} parameters train"
    )
    for note in data.notes:
        display.note(note)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    display.note(f"devices: {mesh.size} {mesh.devices.flat[0].platform} ({shape}), strategy {strategy.name}")
    extra = -run.train.batch_size % (row_multiple(run, mesh, strategy) * jax.process_count())
    if extra:
        display.note(
            f"note: {extra} empty rows are added to each batch of {run.train.batch_size} to spread it evenly; "
            f"a batch_size of {run.train.batch_size + extra} would cost the same"
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
    display.note(f"metrics: {directory.metrics.path}")
    prompt = evaluation["after"]["samples"][0]["prompt"] if evaluation["after"]["samples"] else "Once upon a time"
    display.note(f"try it: llmtune generate {summary.directory} --prompt {prompt!r}")
