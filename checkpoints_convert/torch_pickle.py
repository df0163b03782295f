"""The pickle inside a torch file, read by a machine that can make tensors' descriptions and nothing else.

A pickle is a program. This reads the few instructions that `torch.save` writes for a flat dict of tensors, and refuses every
other by name: there is no import, no attribute, no call but of the three functions of `CALLABLE`, which are done here.
Values are texts, small integers, booleans, None, tuples, empty dicts and tensors' descriptions; nothing is allocated that the
file does not spell out, and nothing is executed.

    {"norm.weight": tensor}  =  a dict, "norm.weight", _rebuild_tensor_v2(storage "0" of torch.BFloat16Storage, 0, (4096,), (1,))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from llmtune.errors import LlmtuneFormatError

PICKLE_LIMIT = 5_000_000  # bytes; those of the largest published models have a few hundred kilobytes
VALUES_LIMIT = 200_000  # on the stack, and in the memo: a tensor needs about ten
STORAGES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
        "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_, "ComplexFloatStorage": np.complex64,
    }.items()
}  # fmt: skip
CALLABLE = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
}  # fmt: skip


@dataclass(frozen=True)
class PickledTensor:
    """Where a tensor lies: `offset`, `shape` and `stride` count elements within the storage of that key."""

    dtype: np.dtype
    storage: str
    elements: int  # of the whole storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions; never imported."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """A persistent id: elements of one dtype in a record of the file."""

    dtype: np.dtype
    key: str
    elements: int


class _Mark:
    """Where a tuple or a run of items begins on the stack."""


@dataclass
class _Machine:
    """The state of reading one pickle."""

    text: bytes
    at: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def take(self, size: int) -> bytes:
        if size > len(self.text) - self.at:
            raise ValueError("it ends in the middle of an instruction")
        self.at += size
        return self.text[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little", signed=True)

    def line(self) -> str:
        end = self.text.find(b"\n", self.at, self.at + 200)
        if end < 0:
            raise ValueError("a name has no end")
        value = self.text[self.at : end].decode("utf-8")
        self.at = end + 1
        return value

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("it takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for depth in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[depth], _Mark):
                items = self.stack[depth + 1 :]
                del self.stack[depth:]
                return items
        raise ValueError("a group has no beginning")

    def remember(self, key: int) -> None:
        if not self.stack:
            raise ValueError("it takes from an empty stack")
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise ValueError(f"it refers to value {key}, which it never made")
        self.stack.append(self.memo[key])


def read_pickle(text: bytes, where: str) -> dict[str, PickledTensor]:
    """The tensors by name. Raises LlmtuneFormatError naming `where` for anything but a flat dict of tensors."""
    try:
        result = _run(text)
        if type(result) is not dict:
            raise ValueError(f"it holds {_kind(result)} where a dict of tensors is expected")
        for name, value in result.items():
            if not isinstance(value, PickledTensor):
                raise ValueError(f"{name[:100]!r} is {_kind(value)}, not a tensor")
    except (ValueError, OverflowError) as error:
        raise LlmtuneFormatError(
            f"{where}: {error}; only torch files of a plain dict of tensors are read (torch.save(model.state_dict(), path))"
        ) from None
    return result


def _run(text: bytes) -> Any:
    machine = _Machine(text)
    while True:
        code = machine.take(1)[0]
        if code == 0x2E:  # STOP
            if len(machine.stack) != 1 or machine.at != len(text):
                raise ValueError("it stops with values left over")
            return machine.pop()
        instruction = INSTRUCTIONS.get(code)
        if instruction is None:
            raise ValueError(f"its pickle uses instruction 0x{code:02x}, which no tensor needs")
        instruction(machine)
        if len(machine.stack) > VALUES_LIMIT or len(machine.memo) > VALUES_LIMIT:
            raise ValueError("its pickle makes more values than any model has")


def _proto(machine: _Machine) -> None:
    if machine.number(1) > 5:
        raise ValueError("its pickle protocol is unknown")


def _frame(machine: _Machine) -> None:
    machine.take(8)


def _global(machine: _Machine) -> None:
    _push_global(machine, machine.line(), machine.line())


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    _push_global(machine, module, name)


def _push_global(machine: _Machine, module: Any, name: Any) -> None:
    """`find_class`: the names that may be mentioned, all others refused."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("it names a class by something other than text")
    if (module, name) not in CALLABLE and not (module == "torch" and name in STORAGES):
        raise ValueError(f"its pickle asks for {f'{module}.{name}'[:100]!a}, which is none of a tensor's parts")
    machine.stack.append(Global(module, name))


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    if not isinstance(function, Global) or (function.module, function.name) not in CALLABLE:
        raise ValueError(f"its pickle calls {_kind(function)}")
    if type(arguments) is not tuple:
        raise ValueError("its pickle calls a function without a tuple of arguments")
    machine.stack.append(MAKERS[function.name](arguments))


def _make_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise ValueError("an OrderedDict is made from something")
    return {}


def _make_tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    if len(arguments) not in (6, 7):
        raise ValueError("a tensor is made from too few or too many parts")
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor's storage is {_kind(storage)}")
    if not _naturals(shape) or not _naturals(stride) or len(shape) != len(stride) or not _naturals((offset,)):
        raise ValueError("a tensor's shape, strides or offset are not natural numbers")
    if len(shape) > 8 or math.prod(shape) > storage.elements:
        raise ValueError(f"a tensor of shape {str(shape)[:80]} does not fit its storage of {storage.elements} elements")
    return PickledTensor(storage.dtype, storage.key, storage.elements, offset, shape, stride)


def _make_parameter(arguments: tuple[Any, ...]) -> PickledTensor:
    if len(arguments) != 3 or not isinstance(arguments[0], PickledTensor):
        raise ValueError("a parameter is made from something other than a tensor")
    return arguments[0]


MAKERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "OrderedDict": _make_dict, "_rebuild_tensor_v2": _make_tensor, "_rebuild_parameter": _make_parameter,
}  # fmt: skip


def _persistent_id(machine: _Machine) -> None:
    parts = machine.pop()
    if type(parts) is not tuple or len(parts) != 5 or parts[0] != "storage":
        raise ValueError("a storage is not described by its type, key, place and size")
    _, kind, key, place, elements = parts
    if not isinstance(kind, Global) or kind.module != "torch" or not isinstance(place, str):
        raise ValueError("a storage has no type of numbers")
    if (
        not isinstance(key, str)
        or not key.isascii()
        or not key.isalnum()
        or len(key) > 20
        or not _naturals((elements,))
    ):
        raise ValueError("a storage has an odd key or size")
    machine.stack.append(Storage(STORAGES[kind.name], key, elements))


def _set_items(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    _put(machine, items)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _put(machine, [key, value])


def _put(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1] if machine.stack else None
    if type(target) is not dict or len(items) % 2:
        raise ValueError(f"it puts items into {_kind(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise ValueError(f"a tensor's name is {_kind(key)}, not text")
        if key in target:
            raise ValueError(f"the name {key[:100]!a} stands twice")
        target[key] = value


def _build(machine: _Machine) -> None:
    """The `_metadata` that a module's state_dict carries is passed over; no object has its state set."""
    state = machine.pop()
    if (
        not machine.stack
        or type(machine.stack[-1]) is not dict
        or type(state) is not dict
        or set(state) != {"_metadata"}
    ):
        raise ValueError("its pickle sets the state of an object")


def _long(machine: _Machine) -> None:
    size = machine.number(1)
    if size > 8:
        raise ValueError("it holds a number of more than 8 bytes")
    machine.stack.append(machine.signed(size))


def _text(size: int) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        length = machine.number(size)
        if length > 1000:
            raise ValueError(f"it holds a text of {length} bytes")
        machine.stack.append(machine.take(length).decode("utf-8"))

    return push


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


def _tuple_of(size: int) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        items = [machine.pop() for _ in range(size)][::-1]
        machine.stack.append(tuple(items))

    return push


INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _proto,
    0x95: _frame,
    ord("}"): _push(lambda _: {}),
    ord(")"): _push(lambda _: ()),
    ord("("): _push(lambda _: _Mark()),
    ord("N"): _push(lambda _: None),
    0x88: _push(lambda _: True),
    0x89: _push(lambda _: False),
    ord("J"): _push(lambda machine: machine.signed(4)),
    ord("K"): _push(lambda machine: machine.number(1)),
    ord("M"): _push(lambda machine: machine.number(2)),
    0x8A: _long,
    ord("X"): _text(4),
    0x8C: _text(1),
    ord("q"): lambda machine: machine.remember(machine.number(1)),
    ord("r"): lambda machine: machine.remember(machine.number(4)),
    0x94: lambda machine: machine.remember(len(machine.memo)),
    ord("h"): lambda machine: machine.recall(machine.number(1)),
    ord("j"): lambda machine: machine.recall(machine.number(4)),
    ord("t"): lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("c"): _global,
    0x93: _stack_global,
    ord("Q"): _persistent_id,
    ord("R"): _reduce,
    ord("s"): _set_item,
    ord("u"): _set_items,
    ord("b"): _build,
}


def _naturals(value: Any) -> bool:
    return type(value) is tuple and all(type(own) is int and 0 <= own < 2**62 for own in value)


def _kind(value: Any) -> str:
    """Of what kind a value is, without looking into it."""
    if isinstance(value, Global):
        return f"the name {value.module}.{value.name}"
    return {PickledTensor: "a tensor", Storage: "a storage", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )
