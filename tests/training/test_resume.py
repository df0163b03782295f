"""Stopped at any step and taken up again: the bit-identical curve, nothing twice, nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import llmtune
from llmtune import exit_codes
from llmtune.errors import LlmtuneError
from llmtune.training.run_directory import RunDirectory
from tests.runs import LORA_BY_DAY, curve, read_curve, run_config, write_rows
from tests.training.interruption import StoppingDisplay, train_until


@pytest.fixture(scope="module")
def data(batches, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *batches)


def small_run(directory, model, data, name="run", **sections):
    defaults = {
        "train": {"steps": 12, "batch_size": 4, "dtype": "bfloat16", "microbatches": 2, "seed": 3},
        "data": {"train": str(data), "format": "tokens", "sequence_length": 96, "packing": True, "shuffle": True},
        "checkpoint": {"every": 4, "keep": 2},
        "evaluate": {"every": 5},
    }
    return run_config(directory, model, data, name=name, **{**defaults, **sections})


@pytest.mark.parametrize("adapt", LORA_BY_DAY)
def test_stopped_twice_and_resumed_the_curve_is_bit_identical(stories, data, tmp_path, adapt):
    whole = curve(small_run(tmp_path, stories, data, "whole", adapt=adapt))
    run = small_run(tmp_path, stories, data, "stopped", adapt=adapt)
    train_until(run, 6)
    train_until(run, 9)
    losses, norms = curve(run)
    np.testing.assert_array_equal(losses, whole[0])
    np.testing.assert_array_equal(norms, whole[1])
    exported = [(tmp_path / name / "export/model/model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert exported[0] == exported[1]


def test_a_finished_run_is_not_trained_again(stories, data, tmp_path):
    run = small_run(tmp_path, stories, data)
    first = curve(run)
    shutil.rmtree(tmp_path / "run" / "export")
    np.testing.assert_array_equal(curve(run)[0], first[0])
    assert (tmp_path / "run/export/model/model.safetensors").is_file()
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2  # keep


def test_killed_without_warning_it_resumes_from_the_last_checkpoint(stories, data, tmp_path):
    """kill -9 of the real command, in its own process, right after a checkpoint was begun."""
    expected = curve(small_run(tmp_path, stories, data, "whole"))
    run = small_run(tmp_path, stories, data, "killed")
    command = [sys.executable, "-m", "llmtune.cli", "train", str(tmp_path / "killed.yaml")]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while process.poll() is None and not (checkpoints / "4").is_dir():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    np.testing.assert_array_equal(curve(run)[0], expected[0])
    assert len(read_curve(run.output)[0]) == len(expected[0])


def test_another_configuration_is_refused_with_what_differs(stories, data, tmp_path):
    run = small_run(tmp_path, stories, data)
    train_until(run, 5)
    other = small_run(tmp_path, stories, data, train={"steps": 13, "batch_size": 4})
    with pytest.raises(LlmtuneError, match=r"holds another run \(train.steps: 12 there, 13 here") as refused:
        llmtune.train(other)
    assert str(refused.value).endswith(f"with continue_from: {tmp_path / 'run'} it begins with this run's weights")
    other = small_run(tmp_path, stories, data, adapt={"rank": 4})
    with pytest.raises(LlmtuneError, match=r"adapt.rank: None there, 4 here.*or choose another output$"):
        llmtune.train(other)


def test_changed_data_is_refused(stories, data, tmp_path):
    copy = tmp_path / "rows.jsonl"
    shutil.copy(data, copy)
    run = small_run(tmp_path, stories, copy)
    train_until(run, 5)
    copy.write_text(copy.read_text() * 2)
    with pytest.raises(LlmtuneError, match="begun with other data"):
        llmtune.train(run)


def test_a_changed_base_is_refused(stories, data, tmp_path):
    """An adapter's checkpoint means nothing on other weights, not even on those that differ in one tensor."""
    model = shutil.copytree(stories, tmp_path / "model")
    run = small_run(tmp_path, model, data, adapt={"rank": 4, "alpha": 8})
    train_until(run, 5)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(LlmtuneError, match=r"begun with another base model \(the files of .*model have changed since"):
        llmtune.train(run)
    content[-2] ^= 1
    weights.write_bytes(content)
    train_until(run, 6)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("run.json", RunDirectory.read_facts),
        ("evaluation.json", RunDirectory.read_evaluation),
        ("held_out/before.npy", lambda directory: directory.read_held_out("before")),
        ("metrics.jsonl", lambda directory: directory.metrics.cut_after(1)),
    ],
)
def test_a_damaged_file_of_the_run_is_named_in_one_line(tmp_path, name, read):
    (tmp_path / "held_out").mkdir()
    (tmp_path / name).write_bytes(b'{"step"\n')
    with pytest.raises(LlmtuneError, match=f"{name}.*: damaged") as refused:
        read(RunDirectory(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_directory_of_something_else_is_left_alone(stories, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(LlmtuneError, match="no llmtune run"):
        llmtune.train(small_run(tmp_path, stories, data))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_damaged_step_is_set_aside_and_the_one_before_is_gone_on_from(stories, data, tmp_path):
    whole = curve(small_run(tmp_path, stories, data, "whole"))
    run = small_run(tmp_path, stories, data)
    train_until(run, 9)
    flip_a_bit(tmp_path / "run/checkpoints/8")
    display = StoppingDisplay()
    np.testing.assert_array_equal(curve(run, display=display)[0], whole[0])
    assert "step 8 is damaged (bytes of its files have changed); it is kept as 8.corrupt" in display.text
    assert "resuming after step 4 of" in display.text
    assert (tmp_path / "run/checkpoints/8.corrupt/MANIFEST.json").is_file()


def test_with_no_good_step_left_nothing_begins_anew(stories, data, tmp_path):
    run = small_run(tmp_path, stories, data)
    train_until(run, 9)
    for step in ("4", "8"):
        flip_a_bit(tmp_path / "run/checkpoints" / step)
    before = read_curve(run.output)[0]
    for reason in ("step 8: bytes of its files have changed; step 4: bytes", "4.corrupt from before; 8.corrupt from"):
        with pytest.raises(LlmtuneError, match=rf"no checkpoint can be gone on from \({reason}"):
            llmtune.train(run, devices=jax.devices()[:1])
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(LlmtuneError, match="was saved up to step 8, and no checkpoint is there"):
        llmtune.train(run, devices=jax.devices()[:1])
    np.testing.assert_array_equal(read_curve(run.output)[0], before)


def flip_a_bit(step):
    """In the middle of its largest file."""
    file = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_full_disk_is_one_clear_line(stories, data, tmp_path):
    """A limit on the size of files stands for the disk: no checkpoint and no export fits under it."""
    small_run(tmp_path, stories, data)
    no_cache = "JAX_ENABLE_COMPILATION_CACHE=false"  # jax would warn that its own file does not fit either
    script = f"ulimit -f 200; {no_cache} exec {sys.executable} -m llmtune.cli train {tmp_path / 'run.yaml'}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == exit_codes.RETRY, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr[-2000:]
    assert "saving a checkpoint failed" in done.stderr
    assert done.stdout.count("it is tried again") == 1
    assert not (tmp_path / "run" / "export").exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
