"""A training run, as a story read from top to bottom: data, mesh, weights, step, loop, export."""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmtune import pretrained
from llmtune.config import Run
from llmtune.data import RunData, evaluation_batches, load_data, read_batches
from llmtune.errors import LlmtuneConfigError, LlmtuneError
from llmtune.evaluation.perplexity import HeldOut, held_out_loss
from llmtune.generation.engine import Engine
from llmtune.model import encode_prompt
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.sharding import Strategy, axis_size
from llmtune.training import samples
from llmtune.training.checkpoint import Checkpoints
from llmtune.training.display import Display, step_status
from llmtune.training.export import export_run
from llmtune.training.optimizer import make_optimizer, make_schedule
from llmtune.training.remat import POLICIES
from llmtune.training.run_directory import RunDirectory, claim
from llmtune.training.state import TrainState, init_state
from llmtune.training.step import make_eval_step, make_train_step
from llmtune.training.weights import choose_layout, prepare_weights
from llmtune.transforms import combine

OBJECTIVES = {"pretrain": next_token_loss, "sft": next_token_loss}
Batch = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What a finished run came to. Held-out figures are None where there is no validation data."""

    directory: Path
    steps: int
    before: HeldOut | None
    after: HeldOut | None


def train(run: Run, display: Display | None = None) -> Summary:
    """Carry out a run, or take it up where its last checkpoint left it. Raises LlmtuneError for what a user can mend."""
    with display or Display() as display:
        source = pretrained.open_source(run.model)
        data = load_data(run, source.config, source.directory, display)
        _, declared = declare(source.config)
        mesh, strategy = choose_layout(run.sharding, declared)
        check_rows(run, mesh, strategy)
        directory = claim(run)

        with jax.set_mesh(mesh):
            display.phase("reading weights", total=max(source.weight_bytes, 1))
            weights = prepare_weights(run, source, mesh, strategy, display.advance)
            steps = data.steps(run.train.steps, run.train.epochs, run.train.batch_size)
            schedule = make_schedule(run.optimizer, steps)
            optimizer = make_optimizer(run.optimizer, schedule)
            state = init_state(weights.trainable, optimizer)
            frozen = weights.frozen
            describe(display, run, source, weights, mesh, data, steps)

            bind = functools.partial(
                LanguageModel, weights.graphdef, dtype=jnp.dtype(run.train.dtype), remat=POLICIES[run.train.remat]
            )
            objective = OBJECTIVES[run.objective]
            step = make_train_step(bind, objective, optimizer, schedule, strategy, run.train.microbatches)
            evaluate = make_eval_step(bind, objective, strategy)

            checkpoints = Checkpoints(directory.checkpoints, run.checkpoint.keep)
            state = resume(directory, checkpoints, state, mesh, display)
            first = int(state.step)
            batches = read_batches(data.train, run, first, steps)
            place = functools.partial(place_batch, mesh=mesh, strategy=strategy)
            held_out = Evaluator(run, data, jax.jit(evaluate), place)
            before = measure(directory, "before", run, state, frozen, held_out, engine_for(bind, source, mesh, strategy), data, display)

            display.phase("training", total=steps, done=first)
            ...
    return Summary(directory.path, steps, before, None)
