"""The least time that a step can take at the chip's published rates, part by part.

    compute   FLOPs that are computed / the chip's peak
    memory    bytes read and written / its bandwidth
    ici       wire bytes / the links that the ring of an exchange can use: two along each side of the torus that wraps around,
              one along each that does not
    dcn       wire bytes between slices or hosts / the device's share of its host's network

`overlapped`: everything hides behind the longest. `apart`: exchanges wait for the arithmetic. The truth lies between.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from llmtune.planning.collectives import Collective
from llmtune.planning.costs import Costs
from llmtune.planning.topology import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds, and the share of the chip's peak that the model's FLOPs can reach when all is overlapped."""

    compute: float
    memory: float
    ici: float
    dcn: float
    mfu: float

    @property
    def overlapped(self) -> float:
        """Everything at the same time."""
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def apart(self) -> float:
        """Arithmetic and memory at the same time, then the exchanges."""
        return max(self.compute, self.memory) + self.ici + self.dcn


def roofline(topology: Topology, mesh: Mesh, costs: Costs, update: float, exchanged: Sequence[Collective]) -> Roofline:
    """Of a step with these costs over all devices; `update`: bytes that each device moves to update what trains."""
    chip, count = topology.chip, mesh.size
    compute = costs.computed_flops / count / chip.flops
    memory = (costs.memory_bytes / count + update) / chip.hbm_bandwidth
    between = [(own, *path_of(topology, mesh, own.axes)) for own in exchanged]
    ici = sum(own.wire / bandwidth for own, bandwidth, far in between if not far)
    dcn = sum(own.wire / bandwidth for own, bandwidth, far in between if far)
    bare = Roofline(compute, memory, ici, dcn, 0.0)
    return Roofline(compute, memory, ici, dcn, costs.model_flops / count / chip.flops / bare.overlapped)


def path_of(topology: Topology, mesh: Mesh, axes: str) -> tuple[float, bool]:
    """Bytes/s that each device can send to the others along these mesh axes, and whether it leaves the slice or the host."""
    chip, names = topology.chip, axes.split("+")
    index = tuple(slice(None) if name in names else 0 for name in mesh.axis_names)
    group = list(mesh.devices[index].reshape(-1))
    if len({_island(topology, device) for device in group}) > 1:
        return chip.dcn_bandwidth / chip.host_devices, True
    if topology.family is None:
        return chip.links * chip.link_bandwidth, False
    places = np.array([device.coords for device in group])
    spans = [len(set(side.tolist())) for side in places.T][: len(topology.shape)]
    links = sum(
        (2 if wraps and span == size else 1)
        for span, size, wraps in zip(spans, topology.shape, topology.wraps, strict=True)
        if span > 1
    )
    return max(links, 1) * chip.link_bandwidth, False


def _island(topology: Topology, device: object) -> int:
    """The slice of a TPU, the host of a GPU: what devices of one have faster links than the network."""
    name = "process_index" if topology.family is None else "slice_index"
    return getattr(device, name, None) or 0
