"""Runs of several processes: one curve, one directory, written by the first."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import llmtune
from llmtune.config import Run
from llmtune.config.data import Data
from llmtune.pretrained import saving
from llmtune.training.run_directory import RunDirectory
from llmtune.training.trackers import open_trackers
from tests.processes import free_address, side_by_side
from tests.runs import read_curve, run_config

PROCESS = """
import sys, jax, llmtune
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
llmtune.train(llmtune.load_run(sys.argv[3]))
"""


def be(monkeypatch, index, count=2):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


@pytest.mark.parametrize("index", [0, 1])
def test_the_first_process_alone_writes(monkeypatch, tmp_path, index):
    be(monkeypatch, index)
    run = Run("model", "run", Data("rows.jsonl"))
    with open_trackers(run, RunDirectory(tmp_path), 0, print) as tracker:
        tracker.log({"step": 1, "loss": 2.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if index else ["metrics.jsonl", "tensorboard"])


def test_an_export_takes_all_processes_and_the_first_writes(monkeypatch, stories, tmp_path):
    """What is spread over processes is put together by all of them: they ask for the same, in the same order."""
    model, asked, on_host = llmtune.load(stories), [], saving.on_host
    monkeypatch.setattr(saving, "on_host", lambda array: (asked.append(array.shape), on_host(array))[1])
    model.save(tmp_path / "first")
    first, asked[:] = [*asked], []
    be(monkeypatch, 1, count=1)
    model.save(tmp_path / "second")
    assert asked == first and len(first) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_bad_row_in_one_processes_share_ends_both_alike(starter, tmp_path):
    rows = tmp_path / "rows.jsonl"
    good = '{"prompt": "How much is two and two?", "completion": "Four."}'
    rows.write_text("\n".join([good] * 90 + ['{"prompt": "And three?", "completion": 6}'] + [good] * 9))
    run_config(tmp_path, starter, rows, name="run", data={"train": str(rows), "format": "auto"})
    address = free_address()
    command = [
        sys.executable,
        "-m",
        "llmtune.cli",
        "train",
        tmp_path / "run.yaml",
        "--processes",
        2,
        "--coordinator",
        address,
    ]
    codes, said = side_by_side([[*command, "--process", index] for index in range(2)])
    assert codes == [2, 2], said
    assert all(f"llmtune: error: {rows}:91: the column 'completion' is int" in own for own in said), said


@pytest.mark.nightly
def test_two_processes_train_evaluate_and_export_like_one(starter, tmp_path):
    rows = starter / "instructions_validation.jsonl"
    sections = {
        "data": {"train": str(rows), "validation": str(rows), "sequence_length": 128},
        "adapt": {"rank": 2}, "train": {"steps": 3, "batch_size": 4, "dtype": "float32"}, "evaluate": {"every": 2},
    }  # fmt: skip
    one = run_config(tmp_path, starter, rows, name="one", **sections)
    llmtune.train(one, devices=jax.devices()[:1])
    run_config(tmp_path, starter, rows, name="two", **sections)
    command, address = [sys.executable, "-c", PROCESS], free_address()
    codes, said = side_by_side([[*command, address, index, tmp_path / "two.yaml"] for index in range(2)])
    assert codes == [0, 0], said
    assert "report: " in said[0] and "report: " not in said[1]

    np.testing.assert_allclose(read_curve(tmp_path / "two")[0], read_curve(tmp_path / "one")[0], rtol=1e-5)
    before, after = (json.loads((tmp_path / name / "evaluation.json").read_text())["after"] for name in ("one", "two"))
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5) and after["tokens"] == before["tokens"]
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, shared = (load_file(tmp_path / name / "export" / file) for name in ("one", "two"))
        assert whole.keys() == shared.keys()
        for (
            name
        ) in whole:  # what is stored in 16 bits is rounded: two numbers that differ by 1e-9 may be one step apart there
            step = float(jnp.finfo(whole[name].dtype).eps)
            np.testing.assert_allclose(shared[name], whole[name], rtol=step, atol=2e-5, err_msg=name)
