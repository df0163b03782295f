"""Names of TPU slices and of GPU hosts, and the devices they stand for. None of them has to be here.

v5e:16x16      256 chips of v5e, a full pod             v5e-256     the same, as clouds name it
v5p:4x4x4      64 chips                                 v5p-128     the same: names of v4 and v5p count cores, two a chip
v5p:4x4x4*2    two such slices, connected by the data-center network
h100:8         one host of eight                        h100:4x8    four of them
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from llmtune.chips import Chip, chips
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.gpu_target import gpus


@dataclass(frozen=True)
class Family:
    """How slices of one kind of TPU are built: sides of its torus, chips of a pod, the side from which links wrap around.

    `cores`: how many of them cloud names count for each chip. `libtpu`: the compiler's name of the kind, and what it must be
    told of it: chips of v4 and v5p run as one device each (megacore), on hosts of 2 x 2 chips.
    """

    sides: int
    pod: int
    wraps: int
    libtpu: str
    cores: int = 1
    options: tuple[tuple[str, Any], ...] = ()


MEGACORE = (("chip_config_name", "megacore"), ("chips_per_host_bounds", (2, 2, 1)))
FAMILIES = {
    "v4": Family(3, 4096, 4, "v4", cores=2, options=MEGACORE),
    "v5e": Family(2, 256, 16, "v5e"),
    "v5p": Family(3, 8960, 4, "v5", cores=2, options=MEGACORE),
    "v6e": Family(2, 256, 16, "v6e"),
    "tpu7x": Family(3, 9216, 4, "tpu7x"),
}
ALIASES = {"v5litepod": "v5e"}
NAME = re.compile(r"(?P<chip>[a-z0-9]+)(?::(?P<shape>\d+(x\d+)*)|-(?P<count>\d+))(\*(?P<slices>\d+))?")
ALONE = {  # for libtpu, which else asks the machine that it is on what TPU it has, and lets one process at a time load it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
KNOWN = (
    "v5e:16x16 (sides of a slice), v5p-128 (a cloud's name), v5p:4x4x4*2 (two slices), h100:8, h100:4x8 (hosts x GPUs)"
)


@dataclass(frozen=True)
class Topology:
    """`shape`: chips of one slice along each side of its torus; of GPUs (hosts, GPUs of a host)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def family(self) -> Family | None:
        """That of a TPU; None of GPUs."""
        return FAMILIES.get(self.chip.name)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which sides of a slice the last chip is linked with the first."""
        return tuple(self.family is not None and size % self.family.wraps == 0 for size in self.shape)


def parse_topology(name: str) -> Topology:
    """The topology of a name. Raises LlmtuneConfigError naming what is known."""
    match = NAME.fullmatch(name.strip().lower())
    chip = ALIASES.get(match["chip"], match["chip"]) if match else ""
    if match is None or chip not in chips():
        raise LlmtuneConfigError(f"--topology: {name!r} is not known; chips: {', '.join(chips())}; forms: {KNOWN}")
    family, slices = FAMILIES.get(chip), int(match["slices"] or 1)
    if match["shape"] is None:
        shape = (1, int(match["count"])) if family is None else _cloud_shape(name, chip, family, int(match["count"]))
    else:
        shape = tuple(int(size) for size in match["shape"].split("x"))
        shape = (1, *shape) if family is None and len(shape) == 1 else shape
    sides = 2 if family is None else family.sides
    if len(shape) != sides or min(*shape, slices) < 1:
        raise LlmtuneConfigError(f"--topology: {name!r} must have {sides} sides of 1 and more; forms: {KNOWN}")
    each = chips()[chip].host_devices
    if family is None and (slices > 1 or shape[1] > each):
        raise LlmtuneConfigError(
            f"--topology: {name!r}: a host of {chip} has {each} GPUs; write hosts x GPUs, such as {chip}:2x{each}"
        )
    if family is not None and math.prod(shape) > family.pod:
        raise LlmtuneConfigError(f"--topology: {name!r} has more chips than a pod of {chip}, which has {family.pod}")
    return Topology(name, chips()[chip], shape, slices)


def _cloud_shape(name: str, chip: str, family: Family, count: int) -> tuple[int, ...]:
    """The default sides of a slice of so many chips (or cores): powers of two, as equal as can be, the smallest first."""
    total = count // family.cores
    power = total.bit_length() - 1
    if count % family.cores or total != 2**power or total < 1:
        said = f"counts {count} {'cores' if family.cores > 1 else 'chips'}, for which no default shape is known"
        raise LlmtuneConfigError(
            f"--topology: {name!r} {said}; write the sides, e.g. {chip}:{'x'.join('4' * family.sides)}"
        )
    shape = tuple(2 ** ((power + n) // family.sides) for n in range(family.sides))
    return tuple(sorted(shape, reverse=total < 8))  # 2x2x1, but 2x2x4


def larger(topology: Topology) -> Iterator[Topology]:
    """Topologies of the same chips with 2, 4 and 8 times as many."""
    shape = topology.shape
    for _ in range(3):
        at = 0 if topology.family is None else shape.index(min(shape))  # of GPUs more hosts, of TPUs the shortest side
        shape = tuple(size * 2 if n == at else size for n, size in enumerate(shape))
        if topology.family is not None and math.prod(shape) > topology.family.pod:
            return
        slices = f"*{topology.slices}" if topology.slices > 1 else ""
        yield Topology(
            f"{topology.chip.name}:{'x'.join(map(str, shape))}{slices}", topology.chip, shape, topology.slices
        )


def devices(topology: Topology) -> list[Any]:
    """Its devices as JAX describes them; none of them can run anything, but programs compile for TPUs among them.

    Raises LlmtuneConfigError where the compiler for them is not installed, or refuses the shape.
    """
    family = topology.family
    if family is None:
        return gpus(topology.chip, *topology.shape)
    if importlib.util.find_spec("libtpu") is None:
        raise LlmtuneConfigError(
            f"--topology: {topology.name} needs libtpu, whose compiler runs on any machine; pip install 'llmtune[plan]'"
        )
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = dict(family.options)
    if any(topology.wraps) and family.options:
        options["wrap"] = topology.wraps
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{family.libtpu}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
    except Exception as error:  # jaxlib has one type for all that its plugins say
        said = (str(error).splitlines() or [""])[0]
        raise LlmtuneConfigError(f"--topology: libtpu does not take {topology.name} ({name}): {said}") from error
