"""A run's weights, state and batch as shapes, dtypes and layouts: what its program is compiled for, and nothing held.

    run, source, mesh, strategy  -->  Inputs(weights, state, batch) of jax.ShapeDtypeStruct

A preset stands for the model that it names: its frozen weights have the dtype that its config.json stores.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.adapt import sections
from llmtune.data import added_tokens
from llmtune.errors import LlmtuneConfigError
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import Strategy
from llmtune.training.adapting import choose_transform
from llmtune.training.host_memory import KIND, waits
from llmtune.training.program import Program, assemble, batch_names, row_multiple
from llmtune.training.state import TrainState, first_state
from llmtune.training.state_layout import state_layouts
from llmtune.training.weights import Weights, check_strategy, declare_base
from llmtune.transforms import partition
from llmtune.weights import ArraySpec, is_operator, shardings

STEPS = 1000  # where a run is counted in epochs, whose length only its data knows; a program does not depend on it


@dataclass(frozen=True)
class Inputs:
    """All that the step's program takes; every leaf is a jax.ShapeDtypeStruct with its sharding."""

    weights: Weights
    state: TrainState
    batch: dict[str, Any]


def abstract_program(run: Run, source: pretrained.Source, mesh: Mesh, strategy: Strategy) -> tuple[Program, Inputs]:
    """The program of a run and what goes into it. To be called under the mesh.

    Raises ShardingError naming the weight that does not divide, and LlmtuneConfigError where the batch does not.
    """
    require_whole_rows(run, mesh, strategy)
    weights = abstract_weights(run, source, mesh, strategy)
    program, optimizer, revisions = assemble(run, weights, run.train.steps or STEPS, mesh, strategy)
    first = jax.eval_shape(lambda trainable: first_state(trainable, optimizer, revisions), weights.trainable)
    state = replace(jax.tree.map(lambda leaf: _on(mesh, leaf), first), trainable=weights.trainable)
    if run.optimizer.memory == "host":
        state = replace(state, opt_state=jax.tree.map(_on_host, state.opt_state))
    layout = NamedSharding(mesh, strategy.spec("batch", "seq"))
    rows = jax.ShapeDtypeStruct((run.train.batch_size, run.data.sequence_length), jnp.int32, sharding=layout)
    return program, Inputs(weights, state, dict.fromkeys(batch_names(run), rows))


def abstract_weights(run: Run, source: pretrained.Source, mesh: Mesh, strategy: Strategy) -> Weights:
    """`prepare_weights` without weights: the same declarations, transform and partition."""
    graphdef, declared = declare_base(run, source.config)
    if run.adapt is not None:
        stored = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype") or "float32"
        declared = jax.tree.map(
            lambda w: w if is_operator(w) else replace(w, dtype=stored), declared, is_leaf=is_operator
        )
    adaptation = choose_transform(sections(run.adapt), source, declared, grown=bool(added_tokens(run)))
    transform = adaptation.transform
    adapted = transform.apply(declared, transform.init(declared))
    virtual = LanguageModel(graphdef, adapted).decoder().virtual_tokens()
    check_strategy(source, virtual, mesh, strategy)
    arrays = jax.tree.map(
        lambda spec, layout: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=layout),
        adapted,
        shardings(adapted, mesh, strategy),
        is_leaf=lambda leaf: isinstance(leaf, ArraySpec),
    )
    layouts = state_layouts(partition(adapted, transform.trains)[0], mesh, strategy)
    trainable, frozen = partition(arrays, transform.trains)
    trainable = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(run.train.masters)), trainable)
    return Weights(graphdef, trainable, frozen, adaptation.whole, virtual, layouts)


def require_whole_rows(run: Run, mesh: Mesh, strategy: Strategy) -> None:
    """Refuse a batch of which `train` would have to fill up parts with empty rows: a plan of waste helps nobody."""
    multiple, rows = row_multiple(run, mesh, strategy), run.train.batch_size
    if rows % multiple:
        below, above = rows // multiple * multiple, -(-rows // multiple) * multiple
        of = "" if run.train.microbatches == 1 else f" in {run.train.microbatches} microbatches"
        raise LlmtuneConfigError(
            f"train.batch_size: {rows} rows{of} do not divide over the {multiple // run.train.microbatches} parts into which "
            f"strategy {strategy.name} splits a batch; give {f'{below} or ' if below else ''}{above}"
        )


def device_bytes(leaves: Iterable[Any]) -> int:
    """Bytes on each device of arrays or shapes with shardings; what waits in the host's memory is not there."""
    return part_bytes(leaf for leaf in leaves if leaf.sharding.memory_kind != KIND)


def part_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of each device's part, in whichever memory."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _on(mesh: Mesh, leaf: Any) -> jax.ShapeDtypeStruct:
    typed = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, typed))


def _on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not waits(leaf):
        return leaf
    try:
        there = leaf.sharding.with_memory_kind(KIND)
    except AttributeError:  # a stand-in, which knows no memories
        there = leaf.sharding
    if there.memory_kind != KIND:  # nor do described GPUs
        raise LlmtuneConfigError(
            "optimizer.memory: host can be planned for TPUs alone; plan with optimizer.memory: device"
        )
    return leaf.update(sharding=there)
