"""Save, restore, fall back: on a small state, without a run around it."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from llmtune.config.checkpoint import Best
from llmtune.errors import LlmtuneError, LlmtuneRetryError
from llmtune.training.checkpoint import arrays, steps
from llmtune.training.checkpoint.checkpoints import Checkpoints, flatten
from llmtune.training.checkpoint.retention import Retention
from llmtune.training.state import TrainState

RUN = {"data": "d", "base": "b"}


@pytest.fixture(autouse=True)
def mesh():
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), (AxisType.Explicit,) * 2, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def state(step):
    """Another for every step."""
    own = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(own)}, {"m": jnp.asarray(own[:8]).astype(jnp.bfloat16)})


class Open:
    """Checkpoints of a directory, and what they said."""

    def __init__(self, directory, keep=3, best=None, retries=1, run=RUN):
        self.said, self.counted = [], []
        self.checkpoints = Checkpoints(
            directory / "checkpoints", Retention(keep, best), run, retries, self.said.append, self.counted.append
        )

    def __enter__(self):
        self.checkpoints.__enter__()
        return self

    def __exit__(self, *error):
        self.checkpoints.__exit__(*error)


def save(directory, *which, **options):
    with Open(directory, **options) as own:
        for step in which:
            own.checkpoints.save(step, state(step), {"step": step, "eval_loss": float(step % 7)})
    return own


def restored(directory, mesh, **options):
    """(step, what was said); the arrays are those of that step."""
    with Open(directory, **options) as own:
        found = own.checkpoints.restore(state(0), mesh)
    if found is None:
        return None, own.said
    step = int(found.step)
    for name, leaf in flatten(state(step)).items():
        np.testing.assert_array_equal(flatten(found)[name], leaf)
    return step, own.said


def names(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_what_was_saved_is_restored_and_the_newest_stay(tmp_path, mesh):
    assert restored(tmp_path, mesh) == (None, [])
    assert save(tmp_path, 1, 2, 3, 4, 5, keep=2).counted == [1, 2, 3, 4, 5]
    assert names(tmp_path) == ["4", "5"]
    assert restored(tmp_path, mesh) == (5, [])


def test_the_best_stay_too_over_sessions(tmp_path):
    save(tmp_path, 5, 6, 7, 8, keep=1, best=Best(n=2))  # figures 5, 6, 0, 1
    assert names(tmp_path) == ["7", "8"]
    with Open(tmp_path, keep=1, best=Best(n=2)) as own:
        own.checkpoints.restore(state(0), jax.sharding.get_abstract_mesh())
        for step in (9, 10, 14):  # 2, 3, 0
            own.checkpoints.save(step, state(step), {"eval_loss": float(step % 7)})
    assert names(tmp_path) == ["14", "7"]


def test_the_manifest_says_what_the_step_is(tmp_path):
    save(tmp_path, 3)
    manifest = json.loads((tmp_path / "checkpoints/3/MANIFEST.json").read_text())
    assert (manifest["step"], manifest["run"], manifest["figures"]["eval_loss"]) == (3, RUN, 3.0)
    assert manifest["arrays"]["trainable/w"]["shape"] == [64, 32] and len(manifest["arrays"]) == 3
    found = {
        str(path.relative_to(tmp_path / "checkpoints/3"))
        for path in (tmp_path / "checkpoints/3").rglob("*")
        if path.is_file()
    }
    assert set(manifest["files"]) == found - {"MANIFEST.json"}


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def link(step):
    os.rename(step, step.with_name("elsewhere"))
    step.symlink_to("elsewhere")


def another(step):
    shutil.rmtree(step)
    shutil.copytree(step.with_name("1"), step)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (empty, "MANIFEST.json is missing"),
        (lambda step: (step / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda step: (step / "MANIFEST.json").write_text("{}"), "MANIFEST.json is not what was written"),
        (lambda step: shutil.rmtree(step / "state"), "is missing"),
        (lambda step: (step / "state/more").write_text(""), "state/more was not written by llmtune"),
        (link, "it is a link"),
        (another, "it holds step 1"),
    ],
)
def test_a_damaged_step_is_set_aside_by_name(tmp_path, mesh, damage, reason):
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints/2")
    step, said = restored(tmp_path, mesh)
    assert step == 1 and reason in said[0] and said[0].endswith("it is kept as 2.corrupt"), said
    assert {"1", "2.corrupt"} <= set(names(tmp_path))


def test_arrays_that_are_not_what_was_saved_are_found_even_where_all_files_agree(tmp_path, mesh, monkeypatch):
    """As if a disk, or a reader, gave other bytes the second time."""
    save(tmp_path, 1, 2)
    read = arrays.read

    def flipped(path, like):
        return {name: -own if path.name == "2" else own for name, own in read(path, like).items()}

    monkeypatch.setattr(arrays, "read", flipped)
    step, said = restored(tmp_path, mesh)
    assert step == 1 and "is not what was saved" in said[0]


def test_a_step_of_another_run_is_none_of_this(tmp_path, mesh):
    save(tmp_path, 1)
    with pytest.raises(LlmtuneError, match="step 1: it belongs to a run with another data"):
        restored(tmp_path, mesh, run={**RUN, "data": "other"})


def test_what_lies_beside_the_steps_is_left_alone_and_halves_go(tmp_path, mesh):
    save(tmp_path, 1)
    (tmp_path / "checkpoints/notes.txt").write_text("mine")
    (tmp_path / "checkpoints/007").mkdir()
    for half in ("2.partial", "2.partial.orbax-checkpoint-tmp", "1.partial-removed"):
        (tmp_path / "checkpoints" / half).mkdir()
    assert restored(tmp_path, mesh) == (1, [])
    assert names(tmp_path) == ["007", "1", "notes.txt"]


def test_other_arrays_than_were_saved_are_refused_not_cast(tmp_path, mesh):
    save(tmp_path, 1)
    like = state(0)
    like = TrainState(like.step, {"w": like.trainable["w"].astype(jnp.bfloat16)}, like.opt_state)
    with Open(tmp_path) as own, pytest.raises(LlmtuneError, match=r"trainable/w is .*float32.* in the checkpoint and"):
        own.checkpoints.restore(like, mesh)
    assert names(tmp_path) == ["1"]


def test_a_failed_save_is_told_at_once_and_tried_again(tmp_path, mesh, monkeypatch):
    with Open(tmp_path) as own:
        own.checkpoints.save(1, state(1))
        own.checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        own.checkpoints.save(2, state(2))
        assert own.checkpoints.has_failed() and own.counted == [1]
        monkeypatch.undo()
        own.checkpoints.save(3, state(3))
        assert len(own.said) == 1 and "no space left on device" in own.said[0] and "tried again" in own.said[0]
        own.checkpoints.finish(4, state(4))
        assert own.counted == [1, 3, 4] and not own.checkpoints.has_failed()
    assert restored(tmp_path, mesh)[0] == 4


def test_a_save_that_fails_too_often_stops_the_run(tmp_path, mesh, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(LlmtuneRetryError, match=r"failed .no space left on device.; mend that"), Open(tmp_path) as own:
        own.checkpoints.finish(1, state(1))
        monkeypatch.setattr("llmtune.training.checkpoint.commit.make_durable", full)
        own.checkpoints.finish(2, state(2))
    assert len(own.said) == 1
    assert names(tmp_path) == ["1"] and restored(tmp_path, mesh) == (1, [])


def test_two_runs_do_not_share_a_directory(tmp_path):
    with Open(tmp_path), pytest.raises(LlmtuneRetryError, match="another process trains this run"), Open(tmp_path):
        pass
    with Open(tmp_path):
        pass


def test_steps_that_are_no_numbers_are_none(tmp_path):
    (tmp_path / "12").mkdir()
    for name in ("012", "3.partial", "x", "٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")
    assert steps.steps_on_disk(tmp_path) == [12]
    assert steps.steps_on_disk(tmp_path / "absent") == []
