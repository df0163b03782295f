"""Optimised HLO as text -> computations, their instructions, and how often each runs in one call of the program.

    ENTRY  --while, 32 times-->  body  --fusion-->  fused computation          runs: 1, 32, 32

A scan is a `while`: its trips follow from the bound in its condition, the counter's first value and the body's step (the
text of TPU programs does not state them).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NAME = r"%?([\w.\-]+)"
COMPUTATION = re.compile(rf"^(ENTRY )?{NAME} \(.*\) -> .* \{{$")
INSTRUCTION = re.compile(rf"^\s+(ROOT )?{NAME} = (.*)$")
OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
OPERANDS = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """`shape`: the text of its type; `operands`: the names of what it takes; `rest`: its attributes as text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool
    argument: str  # the text between its parentheses: a constant's value, a parameter's number

    def attribute(self, name: str) -> str | None:
        """A word after `name=`, e.g. of `index=2` or `direction=LT`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """`entry` names the computation that a call of the program runs."""

    entry: str
    computations: Mapping[str, Computation]

    def runs(self) -> Mapping[str, int]:
        """Computation -> how often one call of the program runs it; of conditionals every branch counts."""
        counts: dict[str, int] = defaultdict(int)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                trips = self.trips(name, instruction) if instruction.opcode == "while" else 1
                for called in called_by(instruction):
                    if called in self.computations:
                        visit(called, times * trips)

        visit(self.entry, 1)
        return counts

    def trips(self, computation: str, loop: Instruction) -> int:
        """How often the body of a `while` runs; ValueError where its counter is not understood."""
        known = KNOWN_TRIPS.search(loop.rest)
        if known:
            return int(known[1])
        condition, body = (self.computations[loop.attribute(part) or ""] for part in ("condition", "body"))
        place, bound, direction = _bound(condition)
        first = self._first(computation, loop, place)
        step = _step(body, place)
        span = bound - first + (1 if direction == "LE" else 0)
        return max(0, -(-span // step))

    def _first(self, computation: str, loop: Instruction, place: int) -> int:
        inside = self.computations[computation]
        given = inside[loop.operands[0]]
        return _constant(inside, given.operands[place]) if given.opcode == "tuple" else 0


def read(text: str) -> Module:
    """The module of an HLO dump or of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line == "}":  # attributes of kernels hold text of several lines, which may begin with a brace
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    return Module(entry, computations)


def called_by(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs."""
    for _, name in CALLED.findall(instruction.rest):
        yield name
    for names in CALLED_LISTS.findall(instruction.rest):
        yield from re.findall(r"[\w.\-]+", names)


def kernels(module: Module) -> list[str]:
    """Names of the custom kernels (Pallas, cuDNN) that the program calls, each once."""
    calls = [i for c in module.computations.values() for i in c.values() if i.opcode == "custom-call"]
    own = [i for i in calls if re.search(r'custom_call_target="(tpu_custom_call|__cudnn|__gpu\$)', i.rest)]
    return sorted({i.name.split(".")[0] for i in own})


def _instruction(line: str) -> Instruction | None:
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    right = f" {match[3]}"
    opcode = OPCODE.search(right)
    if opcode is None:
        return None
    argument, rest = _closing(right, opcode.end())
    return Instruction(
        match[2],
        right[: opcode.start()].strip(),
        opcode[1],
        tuple(OPERANDS.findall(argument)),
        rest,
        bool(match[1]),
        argument,
    )


def _closing(text: str, start: int) -> tuple[str, str]:
    """What lies between the parenthesis before `start` and the one that closes it, and what follows."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at], text[at + 1 :]
    return text[start:], ""


def _bound(condition: Computation) -> tuple[int, int, str]:
    """(index of the counter in the loop's tuple, bound, direction) of `counter < constant`."""
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode != "compare":
        raise ValueError(f"a loop's condition is {root.opcode}, not a comparison")
    left, right = (condition[name] for name in root.operands)
    index = left.attribute("index")
    direction = root.attribute("direction")
    if index is None or direction not in ("LT", "LE", "NE"):
        raise ValueError(f"a loop's condition compares {left.opcode} {direction}")
    return int(index), _constant(condition, right.name), direction


def _step(body: Computation, place: int) -> int:
    """What the body adds to its counter."""
    root = next(i for i in body.values() if i.is_root)
    following = body[root.operands[place]]
    while following.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        following = body[following.operands[0]]
    if following.opcode != "add":
        return 1  # fused with something else: counters of scans step by one
    constants = [name for name in following.operands if body[name].opcode == "constant"]
    return int(body[constants[0]].argument) if constants else 1


def _constant(inside: Computation, name: str) -> int:
    found = inside[name]
    while found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        found = inside[found.operands[0]]
    return int(found.argument) if found.opcode == "constant" else 0
