"""One layout of a run on a topology, and what can be said of it without a compiler.

run, topology  -->  Layout(mesh, strategy, shapes of all that goes in)  -->  Estimate(memory, traffic, costs, roofline)
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmtune import pretrained
from llmtune.config import Run, Sharding
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.abstract import Inputs, abstract_program, part_bytes
from llmtune.planning.collectives import Collective
from llmtune.planning.costs import Costs, step_costs
from llmtune.planning.memory import Memory, estimate_memory
from llmtune.planning.roofline import Roofline, roofline
from llmtune.planning.topology import Topology
from llmtune.planning.traffic import estimate_traffic
from llmtune.sharding import OffTorusError, Strategy
from llmtune.training.program import Program
from llmtune.training.weights import choose_layout, declare_base


@dataclass(frozen=True)
class Layout:
    """A run laid out: `run.sharding` names this very mesh and strategy."""

    run: Run
    source: pretrained.Source
    topology: Topology
    mesh: Mesh
    strategy: Strategy
    inputs: Inputs

    @property
    def program(self) -> Program:
        """What `llmtune train` would run; made anew, since most layouts of a search are never compiled."""
        with jax.set_mesh(self.mesh):
            return abstract_program(self.run, self.source, self.mesh, self.strategy)[0]

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis."""
        return {str(axis): size for axis, size in self.mesh.shape.items()}

    @cached_property
    def costs(self) -> Costs:
        """FLOPs and traffic to memory of a step, over all devices."""
        run, weights = self.run, self.inputs.weights
        return step_costs(
            self.source.config,
            weights.trainable,
            weights.frozen,
            rows=run.train.batch_size,
            length=run.data.sequence_length,
            remat=run.train.remat,
            itemsize=jnp.dtype(run.train.dtype).itemsize,
        )

    @cached_property
    def memory(self) -> Memory:
        """Bytes on each device, estimated."""
        return estimate_memory(self.run, self.source.config, self.inputs, self.mesh, self.strategy)

    @cached_property
    def traffic(self) -> tuple[Collective, ...]:
        """Collectives of a step, estimated."""
        return estimate_traffic(self.run, self.source.config, self.inputs, self.mesh, self.strategy)

    def times(self, exchanged: Sequence[Collective] | None = None) -> Roofline:
        """The least time of a step with these collectives; default: the estimated ones."""
        state = self.inputs.state
        trained, moments = (part_bytes(jax.tree.leaves(tree)) for tree in (state.trainable, state.opt_state))
        update = 2 * (trained + moments) + 2 * trained  # both ways; and gradients, written and read
        return roofline(self.topology, self.mesh, self.costs, update, self.traffic if exchanged is None else exchanged)

    def divides(self, pieces: int) -> bool:
        """Whether so many microbatches leave each device whole rows."""
        parts = math.prod(self.mesh.shape[axis] for axis in self.strategy.axes.get("batch", ()))
        return self.run.train.batch_size % (parts * pieces) == 0

    def again(self, **train: Any) -> "Layout":
        """The same layout with other keys under `train` than those that change what goes in: remat, microbatches."""
        return dataclasses.replace(self, run=with_train(self.run, **train))


class TorusError(LlmtuneConfigError):
    """A mesh whose axes do not lie along whole sides of the torus."""


def lay_out(run: Run, source: pretrained.Source, topology: Topology, placed: Sequence[Any]) -> Layout:
    """The run over these devices. Raises what is wrong with its layout, from shapes alone."""
    try:
        mesh, strategy = choose_layout(run.sharding, declare_base(run, source.config)[1], placed)
    except OffTorusError as error:
        sizes = dict(run.sharding.mesh) if run.sharding and run.sharding.mesh else "the default mesh"
        sides = " x ".join(map(str, topology.shape))
        raise TorusError(
            f"sharding.mesh: {sizes} cannot be laid onto the torus of {topology.name}, {sides}; name sizes that are each the "
            "product of some of its sides"
        ) from error
    used = {str(axis): size for axis, size in mesh.shape.items() if size > 1}
    named = dataclasses.replace(run, sharding=Sharding("fsdp" if run.sharding is None else run.sharding.strategy, used))
    with jax.set_mesh(mesh):
        _, inputs = abstract_program(named, source, mesh, strategy)
    return Layout(named, source, topology, mesh, strategy, inputs)


def with_strategy(run: Run, name: str, sizes: Mapping[str, int] | None = None) -> Run:
    """The same run under another strategy; without sizes its mesh is chosen anew, unless it is the run's own strategy."""
    if sizes is None and run.sharding is not None and run.sharding.strategy == name:
        return run
    return dataclasses.replace(run, sharding=Sharding(name, dict(sizes or {})))


def with_train(run: Run, **changes: Any) -> Run:
    """The same run with other keys under `train`."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """`fsdp 64 x tensor 4`: the axes that have more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def device_count(sizes: Mapping[str, int]) -> int:
    """Devices of a mesh of these sizes."""
    return math.prod(sizes.values())
