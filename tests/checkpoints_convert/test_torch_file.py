"""Torch's files against torch itself, and pickles that would do harm if anything ran them."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from checkpoints_convert import torch_file
from checkpoints_convert.safetensors_reader import WeightDirectory
from checkpoints_convert.safetensors_writer import Entry
from checkpoints_convert.torch_file import read_torch_file, write_torch_file
from checkpoints_convert.torch_pickle import read_pickle
from llmtune.errors import LlmtuneFormatError

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8,
         torch.bool]  # fmt: skip


def tensors():
    torch.manual_seed(0)
    made = {f"{kind}".removeprefix("torch."): (4 * torch.randn(5, 7)).to(kind) for kind in KINDS}
    return made | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "cube": torch.randn(2, 3, 4)}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(path):
    return WeightDirectory(path.parent, read_torch_file(path))


NETWORK = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
SAVED = {"dict": tensors(), "state_dict": NETWORK.state_dict(), "parameters": dict(NETWORK.named_parameters())}


@pytest.mark.parametrize("made", SAVED.values(), ids=SAVED.keys())
def test_what_torch_saves_is_read_bit_by_bit(tmp_path, made):
    torch.save(made, tmp_path / "x.pth")
    weights = read(tmp_path / "x.pth")
    assert list(weights.tensors) == list(made)
    for name, tensor in made.items():
        assert weights.tensors[name].shape == tuple(tensor.shape), name
        assert weights.tensors[name].dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert weights.read(name).tobytes() == raw(tensor.detach()), name


def test_views_of_one_storage_are_read_where_they_lie(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"rows": whole[1:3], "all": whole, "again": whole}, tmp_path / "x.pth")
    weights = read(tmp_path / "x.pth")
    np.testing.assert_array_equal(weights.read("rows"), whole[1:3].numpy())
    assert weights.tensors["all"].start == weights.tensors["again"].start


@pytest.mark.parametrize("load", [{}, {"mmap": True}], ids=["read", "mapped"])
def test_torch_reads_what_is_written(tmp_path, load):
    torch.save(tensors(), tmp_path / "x.pth")
    weights = read(tmp_path / "x.pth")
    entries = [Entry(n, i.dtype, i.shape, lambda n=n: weights.read(n)) for n, i in weights.tensors.items()]
    write_torch_file(tmp_path / "consolidated.00.pth", entries)
    again = torch.load(tmp_path / "consolidated.00.pth", weights_only=True, **load)
    assert list(again) == list(tensors())
    for name, tensor in tensors().items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    assert zipfile.ZipFile(tmp_path / "consolidated.00.pth").testzip() is None
    assert all(info.start % 64 == 0 for info in read_torch_file(tmp_path / "consolidated.00.pth").values())


# --- pickles that are programs ------------------------------------------------------------------------------------


class Calls:
    def __init__(self, function, *arguments, state=None):
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.made


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\4tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\4\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
TRAP = "touched"
HOSTILE = {
    "os.system": pickle.dumps(Calls(os.system, f"touch {TRAP}")),
    "os.system, protocol 0": b"cos\nsystem\n(S'touch touched'\ntR.",
    "os.system, protocol 4": pickle.dumps(Calls(os.system, f"touch {TRAP}"), protocol=4),
    "os.system, protocol 5 in a dict": pickle.dumps({"w": Calls(os.system, f"touch {TRAP}")}, protocol=5),
    "builtins.eval": pickle.dumps(Calls(eval, f"open('{TRAP}', 'w')"), protocol=2),
    "builtins.exec": pickle.dumps(Calls(exec, f"open('{TRAP}', 'w')"), protocol=2),
    "builtins.getattr": b"\x80\2cbuiltins\ngetattr\n.",
    "open for writing": pickle.dumps(Calls(open, TRAP, "w"), protocol=2),
    "an import of a module": b"\x80\2cimportlib\nimport_module\n" + text("antigravity") + b"\x85R.",
    "a name reached through dots": b"\x80\4" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
    "os.system among tensors": b"\x80\2}(" + text("a") + TENSOR + text("b") + b"cos\nsystem\n" + text("i") + b"\x85Ru.",
    "torch's own loader": b"\x80\2ctorch\nload\n" + text("x") + b"\x85R.",
    "torch.hub": b"\x80\2ctorch.hub\nload\n" + text("x") + b"\x85R.",
    "a torch class that is no storage": b"\x80\2ctorch\nTensor\n.",
    "numpy's reconstruct": pickle.dumps(np.ones(3), protocol=2),
    "an object whose state is set": b"\x80\2ccollections\nOrderedDict\n)R}(" + text("__class__") + b"K\1ub.",
    "__setstate__ of a tensor": b"\x80\2" + TENSOR + b"}" + text("_metadata") + b"}sb.",
    "__setstate__ of its own class": pickle.dumps(Calls(dict, state={"x": 1}), protocol=2),
    "an OrderedDict made from a call": b"\x80\2ccollections\nOrderedDict\n]\x85R.",
    "a new object (NEWOBJ)": b"\x80\2ccollections\nOrderedDict\n)\x81.",
    "an instance (INST)": b"(S'id'\nios\nsystem\n.",
    "an object (OBJ)": b"(cos\nsystem\nS'id'\no.",
    "an extension code (EXT1)": b"\x80\2\x82\1.",
    "a persistent id as text (PERSID)": b"Pstorage\n.",
    "a call of text": b"\x80\2" + text("os.system") + text("id") + b"\x85R.",
    "a call of a storage class": b"\x80\2ctorch\nFloatStorage\n(J\xff\xff\xff\x7ftR.",
    "a call with a dict of arguments": b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n}R.",
    "a text of four gigabytes": b"\x80\2X\xff\xff\xff\xff" + b"a" * 100,
    "bytes of 2**60 (BINBYTES8)": b"\x80\4\x8e" + struct.pack("<Q", 2**60) + b".",
    "a bytearray of 2**60 (BYTEARRAY8)": b"\x80\5\x96" + struct.pack("<Q", 2**60) + b".",
    "a number of a gigabyte (LONG4)": b"\x80\2\x8b\xff\xff\xff\x3f" + b"1" * 100,
    "a number of 255 bytes": b"\x80\2\x8a\xff" + b"\x7f" * 255 + b".",
    "a tensor larger than its storage": b"\x80\2}" + text("a") + TENSOR.replace(b"K\4\x85K\1", b"J\0\0\0\x7f\x85K\1") + b"s.",
    "a storage of 2**63": b"\x80\2}" + text("a") + TENSOR.replace(b"K\4tQ", b"\x8a\x08" + b"\xff" * 7 + b"\x7ftQ") + b"s.",
    "a tensor of negative size": b"\x80\2}" + text("a") + TENSOR.replace(b"K\4\x85K\1", b"J\xff\xff\xff\xff\x85K\1") + b"s.",
    "a memo bomb: tuples of tuples": b"\x80\2)q\0" + b"h\0h\0h\0\x87q\0" * 5000 + b".",
    "a memo of millions of values": b"\x80\4N" + b"\x94" * 1_000_000 + b".",
    "millions of dicts": b"\x80\2" + b"}" * 1_000_000 + b".",
    "a key that is a bomb": b"\x80\2}(" + b")q\0" + b"h\0h\0h\0\x87q\0" * 500 + b"K\1u.",
    "a value that was never made": b"\x80\2h\7.",
    "marks without end": b"\x80\2" + b"(" * 100_000 + b"t.",
    "an empty stack": b"\x80\2R.",
    "no end": b"\x80\2}",
    "nothing": b"",
    "more after the end": b"\x80\2}.}.",
    "a list": b"\x80\2].",
    "a number for a tensor": pickle.dumps({"x": 1}, protocol=2),
    "a text for a tensor": pickle.dumps({"x": "y"}, protocol=2),
    "a dict of dicts": b"\x80\2}" + text("model") + b"}s.",
    "a tensor without a name": b"\x80\2}K\1" + TENSOR + b"s.",
    "one name twice": b"\x80\2}(" + text("a") + TENSOR + text("a") + TENSOR + b"u.",
    "an unknown protocol": b"\x80\x63}.",
    "a name without end": b"c" + b"a" * 1_000_000,
    "a storage whose key leads out": b"\x80\2}" + text("a") + TENSOR.replace(text("0"), text("../../etc")) + b"s.",
}  # fmt: skip


def archive(path, pickled: bytes, **records):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/data/0", bytes(16))
        for name, content in records.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_pickle_is_refused_and_does_nothing(pickled, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "x.pth", pickled)
    tracemalloc.start()
    try:
        refusal(path, read_torch_file, path)
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pth"]


def test_the_same_pickle_without_the_poison_is_read(tmp_path):
    """So that the refusals above are of the poison, and not of the frame around it."""
    weights = read(archive(tmp_path / "x.pth", b"\x80\2}" + text("a") + TENSOR + b"s."))
    np.testing.assert_array_equal(weights.read("a"), np.zeros(4, np.float32))


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_to_a_pickle_is_a_typed_error_or_harmless(seed):
    with io.BytesIO() as file:
        torch.save({f"layers.{i}.w": torch.ones(2, 3) for i in range(3)}, file)
        sound = zipfile.ZipFile(file).read(next(n for n in zipfile.ZipFile(file).namelist() if n.endswith("data.pkl")))
    draw = np.random.default_rng(seed)
    for _ in range(400):
        damaged = bytearray(sound)
        for at in draw.integers(0, len(sound), draw.integers(1, 4)):
            damaged[at] = draw.integers(0, 256)
        try:
            read_pickle(bytes(damaged), "x.pth")
        except LlmtuneFormatError as error:
            assert str(error).isprintable() and "x.pth" in str(error)


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_from_before_torch_1_6_is_refused_by_name(tmp_path, refusal):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "1.6" in refusal(tmp_path / "old.pth", read_torch_file, tmp_path / "old.pth")


SOUND = b"\x80\2}" + text("a") + TENSOR + b"s."


@pytest.mark.parametrize("keep", [0, 3, 10, 60, 150, -1, -10, -30])
def test_a_file_that_is_cut_off_is_refused(keep, tmp_path, refusal):
    whole = archive(tmp_path / "x.pth", SOUND).read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[:keep])
    refusal(tmp_path / "x.pth", read_torch_file, tmp_path / "x.pth")


def test_odd_archives_are_refused(tmp_path, refusal):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", SOUND, zipfile.ZIP_STORED)
        file.writestr("x/data/0", bytes(16))
    assert "compressed" in refusal(path, read_torch_file, path)
    archive(path, SOUND, **{"y/data.pkl": SOUND})
    assert "data.pkl" in refusal(path, read_torch_file, path)
    archive(path, SOUND, **{"x/byteorder": b"big"})
    assert "big-endian" in refusal(path, read_torch_file, path)
    archive(path, SOUND.replace(text("0"), text("7")))
    assert "storage 7 is missing" in refusal(path, read_torch_file, path)
    archive(path, SOUND.replace(b"K\4tQ", b"K\5tQ"))
    assert "16 bytes" in refusal(path, read_torch_file, path)
    archive(path, SOUND.replace(b"K\4\x85K\1\x85", b"K\2\x85K\2\x85"))
    assert "strides" in refusal(path, read_torch_file, path)
    path.unlink()
    os.mkfifo(path)
    refusal(path, read_torch_file, path)


def test_a_directory_of_records_larger_than_memory_is_not_read(tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(torch_file, "READ_LIMIT", 100)
    path = archive(tmp_path / "x.pth", SOUND)
    assert "directory" in refusal(path, read_torch_file, path)
