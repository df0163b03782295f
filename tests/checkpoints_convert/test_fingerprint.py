"""A model is known by a hash of its tensors, however they are spread over files."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert.fingerprint import END, fingerprint
from checkpoints_convert.safetensors_writer import Entry, write_shards


def tensors():
    large = np.random.default_rng(0).standard_normal((END // 4, 9)).astype(np.float32)
    return {"large": large, "small": np.arange(7, dtype=np.float32), "none": np.zeros((0, 3), np.float32)}


def write(directory, values, shard_bytes=10**9):
    directory.mkdir()
    entries = [Entry(name, v.dtype, v.shape, lambda v=v: v) for name, v in values.items()]
    write_shards(directory, entries, max_shard_bytes=shard_bytes)
    return fingerprint(directory)


def test_the_files_do_not_matter(tmp_path):
    one = write(tmp_path / "one", tensors())
    assert one == write(tmp_path / "several", tensors(), shard_bytes=100)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    (tmp_path / "theirs").mkdir()
    save_file(tensors(), tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    assert one == fingerprint(tmp_path / "theirs")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"small": t["small"] + 1},
        lambda t: t | {"large": np.concatenate([t["large"][:1] + 1, t["large"][1:]])},
        lambda t: t | {"large": np.concatenate([t["large"][:-1], t["large"][-1:] + 1])},
        lambda t: t | {"small": t["small"].reshape(7, 1)},
        lambda t: t | {"small": t["small"].view(np.int32)},
        lambda t: {("other" if name == "small" else name): value for name, value in t.items()},
        lambda t: {name: value for name, value in t.items() if name != "none"},
    ],
    ids=["a value", "the first row", "the last row", "a shape", "a dtype", "a name", "an empty tensor"],
)
def test_what_differs_is_seen(tmp_path, change):
    assert write(tmp_path / "one", tensors()) != write(tmp_path / "other", change(tensors()))
