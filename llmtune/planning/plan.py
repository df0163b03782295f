"""What a run would take, as a story: from its configuration and a topology to a verdict for each strategy.

    run, v5e:16x16, [fsdp, tensor]  -->  [Plan(strategy, mesh, memory, costs, roofline, fits), ...]

Nothing is read but configurations: no weights, no tokenizer unless the run adds tokens, no data.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmtune import pretrained
from llmtune.config import Run, Sharding
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.abstract import abstract_program, device_bytes
from llmtune.planning.ahead import Compiled, compile_step
from llmtune.planning.costs import Costs, step_costs
from llmtune.planning.roofline import Roofline, roofline
from llmtune.planning.topology import Topology, devices
from llmtune.sharding import Strategy
from llmtune.training.vocabulary import settle_vocabulary
from llmtune.training.weights import choose_layout, declare_base

Note = Callable[[str], None]  # called with a line for whoever waits


@dataclass(frozen=True)
class State:
    """Bytes on each device of what stays from step to step: exact, from shapes, dtypes and shardings."""

    weights: int
    adapters: int
    moments: int
    gradients: int

    @property
    def total(self) -> int:
        """Of what is there before a step begins: gradients are not."""
        return self.weights + self.adapters + self.moments


@dataclass(frozen=True)
class Plan:
    """One layout of a run on a topology. `limit`: bytes that a program may use on a device."""

    run: Run
    topology: Topology
    strategy: str
    mesh: Mapping[str, int]
    state: State
    compiled: Compiled
    costs: Costs
    roofline: Roofline

    @property
    def limit(self) -> int:
        """Bytes of memory that a program may use on each device."""
        return self.topology.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        """Whether the compiler took it, and its peak lies below the limit."""
        return self.compiled.fits and self.compiled.peak <= self.limit

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.run.train.batch_size * self.run.data.sequence_length


def plan_run(run: Run, topology: Topology, strategies: Sequence[str], note: Note) -> list[Plan]:
    """A plan for each strategy (none named: the run's own). What cannot be laid out is refused before anything compiles."""
    source, _ = settle_vocabulary(run, pretrained.open_source(run.model))
    runs = [run if name is None else with_strategy(run, name) for name in (strategies or [None])]
    placed = devices(topology)
    laid_out = [(own, *lay_out(own, source, placed)) for own in runs]
    return [plan_layout(own, source, topology, mesh, strategy, note) for own, mesh, strategy in laid_out]


def with_strategy(run: Run, name: str) -> Run:
    """The same run under another strategy; its mesh is chosen anew, unless it is the run's own strategy."""
    if run.sharding is not None and run.sharding.strategy == name:
        return run
    return dataclasses.replace(run, sharding=Sharding(strategy=name))


def lay_out(run: Run, source: pretrained.Source, placed: Sequence[Any]) -> tuple[Mesh, Strategy]:
    """The run's mesh over these devices and its strategy. Raises what is wrong with them, from shapes alone."""
    try:
        mesh, strategy = choose_layout(run.sharding, declare_base(run, source.config)[1], placed)
    except NotImplementedError as error:  # of mesh_utils: sizes that are not products of the torus's sides
        sizes = describe_mesh(run.sharding.mesh if run.sharding else {})
        raise LlmtuneConfigError(
            f"sharding.mesh: {sizes} cannot be laid onto the torus; give each axis the product of some of its sides"
        ) from error
    with jax.set_mesh(mesh):
        abstract_program(run, source, mesh, strategy)
    return mesh, strategy


def plan_layout(
    run: Run, source: pretrained.Source, topology: Topology, mesh: Mesh, strategy: Strategy, note: Note
) -> Plan:
    """Compile one layout and read it."""
    with jax.set_mesh(mesh):
        _, inputs = abstract_program(run, source, mesh, strategy)
    trainable, frozen = inputs.weights.trainable, inputs.weights.frozen
    shape = {str(axis): size for axis, size in mesh.shape.items()}
    note(f"compiling {strategy.name} ({describe_mesh(shape)}) for {topology.name}")
    compiled = compile_step(run, source, mesh, strategy)
    note(f"compiled {strategy.name} in {compiled.seconds:.0f} s")
    costs = step_costs(
        source.config,
        trainable,
        frozen,
        rows=run.train.batch_size,
        length=run.data.sequence_length,
        remat=run.train.remat,
        itemsize=jnp.dtype(run.train.dtype).itemsize,
    )
    whole = device_bytes(jax.tree.leaves(trainable))
    state = State(
        weights=device_bytes(jax.tree.leaves(frozen)) + (whole if run.adapt is None else 0),
        adapters=0 if run.adapt is None else whole,
        moments=device_bytes(jax.tree.leaves(inputs.state.opt_state)),
        gradients=whole,
    )
    update = 2 * (whole + state.moments) + 2 * whole
    times = roofline(topology, mesh, costs, update, compiled.collectives)
    return Plan(run, topology, strategy.name, shape, state, compiled, costs, times)


def describe_mesh(shape: Mapping[str, int]) -> str:
    """`fsdp 64 x tensor 4`: the axes that have more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"
