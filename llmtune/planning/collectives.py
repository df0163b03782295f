"""What a compiled program exchanges between devices: by kind, by mesh axis, in bytes.

    all-gather  fsdp  225 of them  16.1 GB of results  15.1 GB over each device's links

Wire bytes are those of a ring of g devices, per device: an all-gather, reduce-scatter or all-to-all of n bytes sends
n (g - 1) / g, an all-reduce twice that, a permutation n. One exchange that the compiler spreads over several fusions (start,
steps, done: all with one channel) counts once, as often as it is started: its steps may run in a loop in between.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmtune.planning.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
SHARED_CHANNEL = "1"  # that of all collectives inside of a `shard_map`
STARTS = 'custom_call_target="AsyncCollectiveStart"'
SCATTERING = "all-reduce-scatter"  # computations of that name (SingleInputAllReduceScatterFusion)
ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "s8": 8, "u8": 8}
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
MESH_GROUPS = re.compile(r"replica_groups=@?mesh\[([^\]]*)\]\s*\{([^}]*)\}")
IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")


@dataclass(frozen=True)
class Collective:
    """`count` exchanges of one kind over one set of mesh axes in a step: bytes of payload and on the wire, per device.

    `axes` in the mesh's order, joined by `+`; `ways`: devices of one group.
    """

    kind: str
    axes: str
    ways: int
    count: int
    payload: int
    wire: int


def collectives(module: Module, axes: Sequence[str], sizes: Sequence[int]) -> list[Collective]:
    """All of a program for a mesh of these axes, the largest on the wire first."""
    runs, by_channel = module.runs(), defaultdict[str, list[_Part]](list)
    for name, computation in module.computations.items():
        for instruction in computation.values() if name in runs else ():
            kind = _kind(instruction.opcode, name)
            if kind is not None:
                channel = instruction.attribute("channel_id")
                if channel in (None, SHARED_CHANNEL):
                    channel = f"{name}/{instruction.name}"
                by_channel[channel].append(_Part(runs[name], kind, instruction, computation))
    sums: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for parts in by_channel.values():
        times, kind, instruction, computation = _exchange(parts)
        group = _group(instruction, math.prod(sizes))
        ways = 2 if kind == "collective-permute" else len(group)
        payload = _payload(kind, instruction, ways, computation)
        own = sums[kind, mesh_axes(group, axes, sizes), ways]
        own[0] += times
        own[1] += times * payload
        own[2] += times * wire_bytes(kind, payload, ways)
    rows = [Collective(*key, *values) for key, values in sums.items()]
    return sorted((row for row in rows if row.ways > 1), key=lambda row: -row.wire)


class _Part(NamedTuple):
    """An instruction of an exchange, whose computation runs so many times."""

    times: int
    kind: str
    instruction: Instruction
    beside: Computation

    @property
    def starts(self) -> bool:
        """Whether it is the start of an exchange that goes on in other computations."""
        return any(STARTS in own.rest for own in self.beside.values())


def _exchange(parts: Sequence[_Part]) -> _Part:
    """The exchange that instructions of one channel make up, and how often there is one."""
    starts = [part for part in parts if part.starts]
    if starts:
        return starts[0]._replace(times=sum(part.times for part in starts))
    return max(parts, key=lambda part: part.times)


def wire_bytes(kind: str, payload: int, ways: int) -> int:
    """Bytes that each device sends around a ring of `ways`."""
    share = {"all-reduce": 2 * (ways - 1) / ways, "collective-permute": 1.0}.get(kind, (ways - 1) / ways)
    return round(payload * share)


def mesh_axes(group: Iterable[int], axes: Sequence[str], sizes: Sequence[int]) -> str:
    """Along which axes of a mesh, its devices numbered in order, the members of a group differ."""
    places = np.array(np.unravel_index(list(group), tuple(sizes)))
    return "+".join(axis for axis, own in zip(axes, places, strict=True) if len(set(own.tolist())) > 1)


def _kind(opcode: str, computation: str) -> str | None:
    """A TPU's fusion `all-reduce-scatter` holds an all-reduce and a slice in words, and is a ring that scatters in deed."""
    base = opcode.removesuffix("-start")
    if base == "all-reduce" and computation.startswith(SCATTERING):
        return "reduce-scatter"
    return base if base in KINDS else None


def _payload(kind: str, instruction: Instruction, ways: int, beside: Computation) -> int:
    """Bytes of the whole: what is gathered, what is reduced before it is scattered, what is sent."""
    sizes = _sizes(instruction)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, contexts): the results
        parts = len(instruction.operands)
        sizes = sizes[parts : 2 * parts]
    if (
        kind == "ragged-all-to-all"
    ):  # the rows that the sender has, or gets back, whatever room there is on the other side
        return min(sizes[0], _sizes(beside[instruction.operands[0]])[0])
    return sum(sizes) * (ways if instruction.opcode.startswith("reduce-scatter") else 1)


def _sizes(instruction: Instruction) -> list[int]:
    """Bytes of each array of its type."""
    return [_bytes(*found) for found in ARRAY.findall(instruction.shape)]


def _bytes(dtype: str, dimensions: str) -> int:
    bits = ITEM_BITS.get(dtype) or int(re.sub(r"^[suf](\d+).*", r"\1", dtype))
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


def _group(instruction: Instruction, devices: int) -> list[int]:
    """The members of the first group."""
    text = instruction.rest
    if found := MESH_GROUPS.search(text):
        names, sizes = zip(*(part.strip().strip("'").split("'=") for part in found[1].split(",")), strict=True)
        chosen = [name.strip().strip("'") for name in found[2].split(",")]
        order = np.arange(math.prod(map(int, sizes))).reshape([int(size) for size in sizes])
        index = tuple(slice(None) if name in chosen else 0 for name in names)
        return order[index].reshape(-1).tolist()
    if found := IOTA_GROUPS.search(text):
        groups, dims = ([int(n) for n in found[n].split(",")] for n in (1, 2))
        order = np.arange(math.prod(dims)).reshape(dims)
        order = order.transpose([int(n) for n in found[3].split(",")]) if found[3] else order
        return order.reshape(groups)[0].tolist()
    if found := PAIRS.search(text):
        pair = next((p for p in re.findall(r"\{(\d+),(\d+)\}", found[1]) if p[0] != p[1]), ("0", "0"))
        return [int(n) for n in pair]
    if found := LISTED_GROUPS.search(text):
        return [int(n) for n in re.findall(r"\d+", found[1].split("}")[0])]
    return list(range(devices))  # no groups: all devices
