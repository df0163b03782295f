"""Writing safetensors: a directory appears complete or not at all, whatever happens to the disk."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from checkpoints_convert import safetensors_writer
from checkpoints_convert.safetensors_reader import INDEX, open_directory
from checkpoints_convert.safetensors_writer import Entry, new_directory, write_json, write_shards
from llmtune.errors import LlmtuneError

FOUR = {f"layer.{i}": np.full((10, 25), i, np.float32) for i in range(4)}  # 1000 bytes each


def save(path: Path) -> None:
    """Two shards, an index and a config."""
    with new_directory(path, 4000) as partial:
        entries = [Entry(name, own.dtype, own.shape, lambda own=own: own) for name, own in FOUR.items()]
        write_shards(partial, entries, max_shard_bytes=2000)
        write_json(partial / "config.json", {"a": 1})


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() if f.is_file() else b"dir" for f in sorted(path.rglob("*"))}


def test_shards_and_their_index_are_what_transformers_expects(tmp_path):
    save(tmp_path / "out")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(tree(tmp_path / "out")) == ["config.json", *shards, INDEX]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == {"metadata": {"total_size": 4000}, "weight_map": {n: shards[i // 2] for i, n in enumerate(FOUR)}}
    weights = open_directory(tmp_path / "out")
    assert all(weights.read(name).tobytes() == own.tobytes() for name, own in FOUR.items())


class FillingDisk:
    """A file on a disk with so much room left."""

    def __init__(self, file, room: list[int]):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        taken = min(self.room[0], len(data))
        self.file.write(data[:taken])
        self.room[0] -= taken
        if taken < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.6, 0.9, 0.999], ids="room for {:.1%}".format)
@pytest.mark.parametrize("there", [False, True], ids=["new", "into an empty directory"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(share, there, tmp_path, monkeypatch):
    save(tmp_path / "room")
    left = [int(share * sum(map(len, tree(tmp_path / "room").values())))]
    if there:
        (tmp_path / "out").mkdir()
    before, really_open = tree(tmp_path), Path.open

    def open_on_that_disk(self, mode="r", *arguments, **more):
        file = really_open(self, mode, *arguments, **more)
        return FillingDisk(file, left) if "w" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_that_disk)
        with pytest.raises(LlmtuneError, match=r"/out: cannot be written \(No space left on device\)") as caught:
            save(tmp_path / "out")
    assert "\n" not in str(caught.value) and left == [0]
    assert tree(tmp_path) == before
    save(tmp_path / "out")  # once there is room again


def test_a_disk_that_notices_when_it_syncs_leaves_nothing_either(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_writer.os, "fsync", full)
    with pytest.raises(LlmtuneError, match="No space left on device"):
        save(tmp_path / "out")
    assert not tree(tmp_path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    with (
        pytest.raises(LlmtuneError, match=r"out: 1000000000.00 GB are needed, .* GB are free"),
        new_directory(tmp_path / "out", 10**18),
    ):
        raise AssertionError
    assert not tree(tmp_path)


def test_a_directory_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for target in ("out", "file"):
        with pytest.raises(LlmtuneError, match=f"{target}: exists and is not empty"):
            save(tmp_path / target)
    assert tree(tmp_path) == before


def test_a_directory_that_is_being_written_is_left_to_who_writes_it(tmp_path):
    with new_directory(tmp_path / "out", 0) as partial:
        (partial / "model.safetensors").write_text("half")
        with pytest.raises(LlmtuneError, match="out: another process is writing it; wait"):
            save(tmp_path / "out")
        assert (partial / "model.safetensors").read_text() == "half"
    assert tree(tmp_path / "out") == {"model.safetensors": b"half"}


def test_what_a_killed_save_left_behind_does_not_get_into_the_next(tmp_path):
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "model.safetensors").exists()
