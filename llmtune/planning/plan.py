"""What a run would take, as a story: from its configuration and a topology to a verdict for each strategy.

    run, v5e:16x16, [fsdp, tensor]  -->  [Plan(layout, compiled), ...]

Nothing is read but configurations: no weights, no tokenizer unless the run adds tokens, no data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmtune import pretrained
from llmtune.config import Run
from llmtune.planning.ahead import Compiled
from llmtune.planning.candidates import best_mesh
from llmtune.planning.collectives import Collective
from llmtune.planning.gpu_target import StandIn
from llmtune.planning.layout import Layout, TorusError, describe_mesh, lay_out, with_strategy
from llmtune.planning.roofline import Roofline
from llmtune.planning.topology import Topology, devices
from llmtune.training.vocabulary import settle_vocabulary

Note = Callable[[str], None]  # called with a line for whoever waits
Compile = Callable[[Layout], Compiled]


@dataclass(frozen=True)
class Plan:
    """A layout, and what the compiler makes of it; `compiled` None: there is no compiler, and all of it is estimated."""

    layout: Layout
    compiled: Compiled | None

    @property
    def limit(self) -> int:
        """Bytes of memory that a program may use on each device."""
        return self.layout.topology.chip.hbm_bytes

    @property
    def needed(self) -> int:
        """Bytes that the program reserves on each device."""
        return self.layout.memory.total if self.compiled is None else self.compiled.needed

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.needed <= self.limit

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on each device by what they are for. What is not exact is put together from what the program needs."""
        own = self.layout.memory
        left = self.needed - own.state
        gradients = min(own.gradients, left)
        kept = min(own.kept, left - gradients)
        return {
            "weights": own.weights,
            "adapters": own.adapters,
            "optimizer state": own.moments,
            "gradients": gradients,
            "activations": kept,
            "temporaries": left - gradients - kept,
        }

    @property
    def exchanged(self) -> tuple[Collective, ...]:
        """The collectives of a step, the largest first."""
        return self.layout.traffic if self.compiled is None else self.compiled.collectives

    @cached_property
    def times(self) -> Roofline:
        """The least time of a step."""
        return self.layout.times(self.exchanged)

    @property
    def tokens_per_second(self) -> float:
        """Over all devices, if everything overlaps: no step can be faster."""
        train = self.layout.run.train
        return train.batch_size * self.layout.run.data.sequence_length / self.times.overlapped


def plan_run(
    run: Run, topology: Topology, strategies: Sequence[str], compile_layout: Compile, note: Note
) -> list[Plan]:
    """A plan for each strategy (none named: the run's own). What cannot be laid out is refused before anything compiles."""
    source, _ = settle_vocabulary(run, pretrained.open_source(run.model))
    placed = devices(topology)
    layouts = [lay_out_strategy(run, source, topology, placed, name) for name in strategies]
    layouts = layouts or [lay_out(run, source, topology, placed)]
    return [plan_layout(layout, compile_layout, note) for layout in layouts]


def lay_out_strategy(
    run: Run, source: pretrained.Source, topology: Topology, placed: Sequence[Any], name: str
) -> Layout:
    """Under a strategy other than the run's own: on the mesh that promises most, where the default one does not fit the torus."""
    try:
        return lay_out(with_strategy(run, name), source, topology, placed)
    except TorusError:
        best = best_mesh(run, source, topology, placed, name)
        if best is None:
            raise
        return best


def plan_layout(layout: Layout, compile_layout: Compile, note: Note) -> Plan:
    """Compile one layout and read it; where no compiler for its devices is here, all is estimated."""
    if isinstance(layout.mesh.devices.flat[0], StandIn):
        return Plan(layout, None)
    name = f"{layout.strategy.name} ({describe_mesh(layout.sizes)})"
    note(f"compiling {name} for {layout.topology.name}; estimated {layout.memory.total / 1e9:.1f} GB per device")
    compiled = compile_layout(layout)
    note(f"{name}: {compiled.needed / 1e9:.1f} GB per device, after {compiled.seconds:.0f} s")
    return Plan(layout, compiled)
