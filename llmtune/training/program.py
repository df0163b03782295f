"""What a run computes: weights in place on a mesh, and the functions that the loop calls on them.

    run, base model, mesh, strategy  -->  Program(frozen, train step, held-out step, bind, ...), state of step zero

The loop, the benchmarks and ahead-of-time planning all build this same program, so that what is measured is what runs.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from llmtune import pretrained
from llmtune.config import Run, sources_of
from llmtune.config.adapt import has_adapter
from llmtune.data import HostBatch
from llmtune.errors import LlmtuneConfigError
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss, next_token_losses
from llmtune.optimizers import make_optimizer, make_schedule, rounded_by_chance
from llmtune.sharding import Strategy, axis_size
from llmtune.training.groups import rates_and_undecayed
from llmtune.training.processes import held_rows
from llmtune.training.remat import POLICIES
from llmtune.training.revisions import (
    choose_objective,
    choose_perturbation,
    choose_revisions,
    choose_update,
    choose_weights,
)
from llmtune.training.state import Revision, TrainState, init_state
from llmtune.training.state_layout import with_split_state
from llmtune.training.step import EvalStep, TrainStep, make_eval_step, make_train_step
from llmtune.training.utilization import Work, model_work, with_pairs
from llmtune.training.weights import Weights, prepare_weights
from llmtune.transforms import combine

HEAD_CHUNK = {"cpu": 32}  # tokens of a row whose logits are held at a time: on a CPU they should stay in its caches
OBJECTIVES = {"pretrain": next_token_loss, "sft": next_token_loss}


@dataclass(frozen=True)
class Program:
    """`frozen`: the weights that stay; `bind` makes the model record of a tree of weights.

    `evaluated`, `exported`: a state -> those of its weights (that train) which are measured, and kept at the end.
    `batch_size`: rows of a global batch, which empty ones fill up to a multiple of `row_multiple`;
    `whole`: the paths of weights that train in whole beside an adapter; `virtual_tokens`: how many a row begins with;
    `work`: the FLOPs of a step.
    """

    mesh: Mesh
    strategy: Strategy
    bind: Callable[[Any], LanguageModel]
    frozen: Any
    step: TrainStep
    held_out_step: EvalStep
    batch_size: int
    row_multiple: int
    evaluated: Callable[[TrainState], Any]
    exported: Callable[[TrainState], Any]
    whole: tuple[str, ...]
    virtual_tokens: int
    work: Work

    def place(self, batch: HostBatch) -> dict[str, jax.Array]:
        """A global batch onto the mesh, of which `batch` has `own_rows`; it is filled up with empty rows."""
        layout = NamedSharding(self.mesh, self.strategy.spec("batch", "seq"))
        held = self._held_rows
        position = np.zeros(self._rows, np.intp)
        position[held] = np.arange(len(held))

        def placed(rows: np.ndarray) -> jax.Array:
            filled = np.pad(rows, ((0, len(held) - len(rows)), (0, 0)))  # segment 0: seen by nobody
            shape = (self._rows, rows.shape[1])
            return jax.make_array_from_callback(shape, layout, lambda at: filled[position[at[0]]][:, at[1]])  # type: ignore[index]

        return {name: placed(rows) for name, rows in batch.items()}

    @property
    def own_rows(self) -> np.ndarray:
        """Which rows of a global batch this process reads, ascending."""
        return self._held_rows[self._held_rows < self.batch_size]

    @property
    def _rows(self) -> int:
        return self.batch_size + -self.batch_size % self.row_multiple

    @functools.cached_property
    def _held_rows(self) -> np.ndarray:
        return held_rows(NamedSharding(self.mesh, self.strategy.spec("batch")), self._rows)

    def compile(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainStep, float]:
        """The train step compiled ahead of time for exactly these shapes and layouts, and the seconds that took.

        It cannot be compiled a second time: other shapes are an error.
        """
        start = time.perf_counter()
        compiled = self.lower(state, batch).compile()
        return compiled, time.perf_counter() - start

    def lower(self, state: TrainState, batch: dict[str, jax.Array]) -> jax.stages.Lowered:
        """The train step traced for these shapes and layouts, which may be abstract; the state is donated."""
        return jax.jit(self.step, donate_argnums=0).lower(state, self.frozen, batch)


def build_program(
    run: Run,
    source: pretrained.Source,
    steps: int,
    mesh: Mesh,
    strategy: Strategy,
    progress: pretrained.Progress,
    begin: Callable[[Any], Any] = lambda trainable: trainable,
) -> tuple[Program, TrainState]:
    """Read the weights, adapt them, and make the functions of a run of so many steps. To be called under the mesh.

    `begin`: from the weights that train, as read, to those that training begins with. The state is not kept in the program: it
    is donated step by step, and a resumed run needs no second copy.
    """
    row_multiple(run, mesh, strategy)  # refuses a layout before anything is read
    weights = prepare_weights(run, source, mesh, strategy, progress)
    program, optimizer, revisions = assemble(run, weights, steps, mesh, strategy)
    return program, init_state(begin(weights.trainable), optimizer, revisions)


def assemble(
    run: Run, weights: Weights, steps: int, mesh: Mesh, strategy: Strategy
) -> tuple[Program, optax.GradientTransformation, tuple[Revision, ...]]:
    """The program of these weights, and what its first state is made with (`first_state`).

    They may be abstract, for compiling ahead of time.
    """
    schedule = make_schedule(run.optimizer, steps)
    optimizer = make_optimizer(run.optimizer, schedule, *rates_and_undecayed(run, weights.trainable))
    optimizer = with_split_state(optimizer, weights.state_layouts)
    if run.train.masters == "bfloat16":
        optimizer = rounded_by_chance(optimizer, run.train.seed)
    bind = functools.partial(
        LanguageModel,
        weights.graphdef,
        dtype=jnp.dtype(run.train.dtype),
        remat=POLICIES[run.train.remat],
        head_chunk=HEAD_CHUNK.get(mesh.devices.flat[0].platform, 512),
    )
    config = bind(combine(weights.trainable, weights.frozen)).decoder().config
    training = functools.partial(bind, packed=run.data.packing)  # held-out rows are packed in nearly any run
    sources = len(sources_of(run.data.train))
    objective = choose_objective(run, OBJECTIVES[run.objective])
    objective = functools.partial(objective, sources=sources) if sources > 1 else objective
    revisions = choose_revisions(run, schedule)
    train = run.train
    step = make_train_step(
        training, objective, optimizer, schedule, strategy, train.microbatches, train.seed, revisions,
        choose_perturbation(run, config), run.regularize.l2_start, choose_update(run),
    )  # fmt: skip
    program = Program(
        mesh,
        strategy,
        bind,
        weights.frozen,
        with_pairs(step, config),
        jax.jit(make_eval_step(bind, next_token_losses, strategy)),
        run.train.batch_size,
        row_multiple(run, mesh, strategy),
        choose_weights(run, averaged=run.average is not None and run.average.evaluate),
        choose_weights(run, averaged=run.average is not None and run.average.export),
        weights.whole,
        weights.virtual_tokens,
        model_work(config, weights.trainable, mesh.devices, adapted=has_adapter(run.adapt)),
    )
    return program, optimizer, revisions


def batch_names(run: Run) -> tuple[str, ...]:
    """What a batch of the run holds, each int32 [batch, seq]."""
    mixed = len(sources_of(run.data.train)) > 1
    return ("tokens", "labels", "segment_ids", "positions", *(("source_ids",) if mixed else ()))


def row_multiple(run: Run, mesh: Mesh, strategy: Strategy) -> int:
    """Rows must be a multiple of this, for every microbatch to divide over the devices that share it."""
    ways = axis_size(mesh, strategy.spec("batch")[0]) * run.train.microbatches
    for axis in ("seq", "residual_seq"):
        cut = axis_size(mesh, strategy.spec(axis)[0])
        if run.data.sequence_length % cut:
            raise LlmtuneConfigError(
                f"data.sequence_length: {run.data.sequence_length} tokens cannot be cut {cut} ways, as strategy "
                f"{strategy.name} does; give a multiple of {cut}"
            )
    return ways
