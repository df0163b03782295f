"""safetensors files against their own library, damage of every kind, hostile indexes."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoints_convert import safetensors_reader
from checkpoints_convert.safetensors_header import DTYPES, HEADER_LIMIT, read_header
from checkpoints_convert.safetensors_reader import INDEX, SINGLE, WeightDirectory, open_directory, read_json
from checkpoints_convert.safetensors_writer import Entry, write_file
from llmtune.errors import LlmtuneFormatError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)
TABLES = st.dictionaries(NAMES.filter("__metadata__".__ne__), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES))
BIT_EQUAL = settings(max_examples=100, deadline=None, derandomize=True)


def content(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes: NaNs of all kinds, infinities and subnormals among them."""
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * DTYPES[dtype].itemsize).astype(np.uint8)
    raw = raw % 2 if dtype == "BOOL" else raw
    return raw.view(DTYPES[dtype]).reshape(shape)


def arrays(table) -> dict[str, np.ndarray]:
    return {name: content(*spec, seed) for seed, (name, spec) in enumerate(table.items())}


def as_torch(array: np.ndarray) -> torch.Tensor:
    kind = getattr(torch, array.dtype.name)
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(kind).reshape(array.shape)


def entries(tensors: dict[str, np.ndarray]) -> list[Entry]:
    return [Entry(name, a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()]


def theirs(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the safetensors library reads."""
    found = safetensors.deserialize(data)
    return {name: (own["dtype"], tuple(own["shape"]), bytes(own["data"])) for name, own in found}


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    directory = WeightDirectory(path.parent, read_header(path))
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: (names[info.dtype], info.shape, directory.read(name).tobytes())
        for name, info in directory.tensors.items()
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """For hypothesis, whose examples share a directory."""
    return tmp_path_factory.mktemp("safetensors")


@given(TABLES)
@BIT_EQUAL
def test_what_is_written_is_read_by_safetensors_bit_by_bit(scratch, table):
    tensors, path = arrays(table), scratch / "written"
    write_file(path, entries(tensors))
    expected = {name: (table[name][0], a.shape, a.tobytes()) for name, a in tensors.items()}
    assert theirs(path.read_bytes()) == expected == ours(path)


@given(TABLES)
@BIT_EQUAL
def test_what_safetensors_writes_is_read_bit_by_bit(scratch, table):
    tensors, path = arrays(table), scratch / "read"
    save_file({name: as_torch(a) for name, a in tensors.items()}, path, {"format": "pt"})
    assert ours(path) == {name: (table[name][0], a.shape, a.tobytes()) for name, a in tensors.items()}


@pytest.mark.parametrize("piece", [1, 40, 10_000])
@given(data=st.data(), shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_slice_is_the_slice_whatever_the_size_of_the_pieces(scratch, piece, data, shape):
    whole, path = content("I32", shape), scratch / "sliced"
    write_file(path, entries({"x": whole}))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    index = tuple(slice(*pair) for pair in bounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_reader, "PIECE", piece)
        read = WeightDirectory(scratch, read_header(path)).read_slice("x", index)
    np.testing.assert_array_equal(read, whole[index])


def test_columns_of_long_rows_are_the_slice(tmp_path):
    whole = content("F16", (3, 10_000))
    write_file(tmp_path / SINGLE, entries({"x": whole}))
    read = open_directory(tmp_path).read_slice("x", (slice(1, 3), slice(5000, 9000)))
    assert read.tobytes() == whole[1:3, 5000:9000].tobytes()


def sound(shape=(2, 3), offsets=(0, 24), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw_file(header, data: bytes = b"\0" * 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


DAMAGED = {
    "empty": b"",
    "shorter than its length prefix": b"\x01\0\0",
    "a header longer than the file": raw_file({"x": sound()}, length=10_000),
    "a header longer than memory": raw_file({"x": sound()}, length=2**63),
    "data cut off": raw_file({"x": sound()}, b"\0" * 23),
    "data too long": raw_file({"x": sound()}, b"\0" * 25),
    "a hole": raw_file({"x": sound(), "y": sound(offsets=(28, 52))}, b"\0" * 52),
    "a hole at the beginning": raw_file({"x": sound(offsets=(4, 28))}, b"\0" * 28),
    "an overlap": raw_file({"x": sound(), "y": sound(offsets=(20, 44))}, b"\0" * 44),
    "two tensors in one place": raw_file({"x": sound(), "y": sound()}),
    "fewer bytes than the shape needs": raw_file({"x": sound((2, 4))}),
    "offsets the wrong way": raw_file({"x": sound(offsets=(24, 0))}),
    "negative offsets": raw_file({"x": sound(offsets=(-24, 0))}),
    "a negative dimension": raw_file({"x": sound((-2, -3))}),
    "a shape that overflows 64 bits": raw_file({"x": sound((2**32, 2**32, 0, 2**40), (0, 24))}),
    "a shape of 2**63": raw_file({"x": sound((2**63,), (0, 2**65))}),
    "a fractional dimension": raw_file({"x": sound((2.0, 3))}),
    "a boolean dimension": raw_file({"x": sound((True, 6))}),
    "an infinite dimension": raw_file(b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,24]}}'),
    "a dimension of 10,000 digits": raw_file(
        b'{"x":{"dtype":"F32","shape":[1' + b"0" * 10_000 + b'],"data_offsets":[0,24]}}'
    ),
    "an unknown dtype": raw_file({"x": sound(dtype="F7")}),
    "a dtype that is no text": raw_file({"x": sound(dtype=["F32"])}),
    "three offsets": raw_file({"x": sound(offsets=(0, 12, 24))}),
    "no offsets": raw_file({"x": {"dtype": "F32", "shape": [6]}}),
    "a field too many": raw_file({"x": {**sound(), "strides": [1]}}),
    "a tensor that is no object": raw_file({"x": [1]}),
    "metadata that is no object": raw_file({"__metadata__": 5, "x": sound()}),
    "metadata that is no text": raw_file({"__metadata__": {"step": 5}, "x": sound()}),
    "the same name twice": raw_file(b'{"x":%s,"x":%s}' % ((json.dumps(sound()).encode(),) * 2)),
    "a header that is no JSON": raw_file(b'{"x": '),
    "a header that is a list": raw_file([]),
    "a header that is no UTF-8": raw_file(b'{"\xff": 1}'),
    "a header nested 100,000 deep": raw_file(b"[" * 100_000),
    "a name with a line break": raw_file({"x\ny": sound(), "z": sound()}),
    "a name with a terminal escape": raw_file({"\x1b[2J": sound(offsets=(4, 28))}, b"\0" * 28),
    "a name of a million characters": raw_file({"x" * 1_000_000: sound(offsets=(4, 28))}, b"\0" * 28),
    "a pickle": b"\x80\x02}q\x00." + b"\0" * 100,
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_by_name(data, tmp_path, refusal):
    path = tmp_path / SINGLE
    path.write_bytes(data)
    refusal(path, open_directory, tmp_path)


def test_a_header_of_absurd_length_is_not_read(tmp_path, refusal):
    path = tmp_path / SINGLE
    with path.open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little"))
        file.truncate(HEADER_LIMIT + 100)
    refusal(path, open_directory, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 60) | st.sampled_from(["F32", "U8", "BOOL", 2**64, 1.5, ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner, max_size=2),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=600, deadline=None, derandomize=True)
def test_whatever_is_accepted_is_what_safetensors_reads(scratch, data):
    """Random damage to the header's fields, to the file's bytes and to its length."""
    header = {
        "__metadata__": {"format": "pt"},
        "x": sound(),
        "y": sound((4,), (24, 28), "U8"),
        "z": sound((), (28, 29), "BOOL"),
    }
    for _ in range(data.draw(st.integers(0, 2))):
        name, field = data.draw(st.sampled_from(sorted(header))), data.draw(st.sampled_from([None, *sound()]))
        if field is None or not isinstance(header[name], dict):
            header[name] = data.draw(JSON)
        else:
            header[name] = {**header[name], field: data.draw(JSON)}
    file = bytearray(raw_file(header, b"\1" * data.draw(st.sampled_from([29, 29, 29, 28, 30, 0]))))
    for _ in range(data.draw(st.integers(0, 2))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    path = scratch / "fuzzed"
    path.write_bytes(file)
    try:
        read = ours(path)
    except LlmtuneFormatError as error:
        assert str(path) in str(error) and str(error).isprintable()
    else:
        assert read == theirs(bytes(file))


# --- directories --------------------------------------------------------------------------------------------------


def write_index(directory: Path, weight_map) -> Path:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.fixture
def directory(tmp_path):
    """A directory with one sound shard, `a`, beside a sound file outside of it."""
    inside = tmp_path / "model"
    inside.mkdir()
    write_file(inside / "a", entries({"x": content("F32", (2, 3))}))
    write_file(tmp_path / "outside", entries({"x": content("F32", (2, 3))}))
    return inside


def test_an_index_that_safetensors_users_write_is_read(directory):
    write_file(directory / "b", entries({"y": content("BF16", (4,))}))
    weights = open_directory(write_index(directory, {"x": "a", "y": "b"}))
    assert weights.read("y").tobytes() == content("BF16", (4,)).tobytes() and weights.total_bytes == 24 + 8


UNSAFE = [
    "../outside", "{absolute}", "link", "sub/inner", "./a", "a/", "..", ".", "", "..\\outside", "a\0", "a\nb", "fifo", "sub",
    "loop", "\ud800", "x" * 300, "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE, ids=lambda name: ascii(name[:20]))
def test_an_index_cannot_lead_out_of_its_directory(name, directory, refusal):
    (directory / "link").symlink_to(directory.parent / "outside")
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "sub").mkdir()
    write_file(directory / "sub" / "inner", entries({"x": content("F32", (2, 3))}))
    os.mkfifo(directory / "fifo")
    name = name.format(absolute=directory.parent / "outside")
    with at_once():
        refusal(directory, open_directory, write_index(directory, {"x": name}))


def test_a_single_file_cannot_lead_out_of_its_directory_either(directory, refusal):
    (directory / SINGLE).symlink_to(directory.parent / "outside")
    refusal(directory / SINGLE, open_directory, directory)


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_file(blobs / "0af1", entries({"x": content("F32", (2,))}))
    (snapshot / SINGLE).symlink_to("../../blobs/0af1")
    assert list(open_directory(snapshot).tensors) == ["x"]


WRONG_INDEX = {
    "a file that is not there": ({"x": "a", "y": "b"}, "b"),
    "a tensor that its file does not hold": ({"x": "a", "y": "a"}, "y"),
    "a tensor with a line break": ({"x": "a", "y\n": "a"}, "y"),
    "a tensor that it does not list": ({"y": "a"}, "x"),
    "no map": ("a", "weight_map"),
    "a file that is no name": ({"x": ["a"]}, "weight_map"),
}


@pytest.mark.parametrize(("weight_map", "named"), WRONG_INDEX.values(), ids=WRONG_INDEX.keys())
def test_an_index_that_does_not_fit_its_files_is_refused(weight_map, named, directory, refusal):
    assert named in refusal(directory, open_directory, write_index(directory, weight_map))


def test_a_tensor_that_the_index_places_elsewhere_is_refused(directory, refusal):
    write_file(directory / "b", entries({"x": content("F32", (2, 3), 1), "y": content("F32", (2,))}))
    write_index(directory, {"x": "a", "y": "b"})
    assert "x" in refusal(directory / "b", open_directory, directory)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b'{"a":1,"a":1}', b'{"a":NaN}', b"[" * 100_000, b'{"a":1' + b"0" * 9999 + b"}"],
    ids=lambda text: ascii(text[:12]),
)  # fmt: skip
def test_an_index_that_is_no_json_object_is_refused(text, directory, refusal):
    (directory / INDEX).write_bytes(text)
    refusal(directory / INDEX, open_directory, directory)


def test_an_index_or_a_json_file_that_never_ends_is_not_waited_for(directory, refusal):
    os.mkfifo(directory / INDEX)
    with at_once():
        refusal(directory / INDEX, open_directory, directory)
        refusal(directory / INDEX, read_json, directory / INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_never_read_but_pointed_out(name, tmp_path, refusal):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    said = refusal(tmp_path, open_directory, tmp_path)
    assert name in said and "convert them to safetensors" in said


def test_a_directory_without_weights_says_what_it_holds(tmp_path, refusal):
    (tmp_path / "config.json").write_text("{}")
    assert "config.json" in refusal(tmp_path, open_directory, tmp_path)
    refusal(tmp_path / "absent", open_directory, tmp_path / "absent")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, refusal):
    write_file(tmp_path / SINGLE, entries({"x": content("F32", (100,))}))
    weights = open_directory(tmp_path)
    os.truncate(tmp_path / SINGLE, 200)
    refusal(tmp_path / SINGLE, weights.read, "x")


@contextmanager
def at_once():
    """Fails, where the block would wait for a file that never ends."""

    def late(*_):
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
