"""A run that begins with the weights of an earlier one, on purpose under other conditions; what does not fit is refused."""

import json

import jax
import numpy as np
import pytest

import llmtune
from llmtune.errors import LlmtuneConfigError
from llmtune.training import continuing
from llmtune.training.run_directory import RunDirectory
from tests.evaluation.runs import short_run

DEVICES = slice(1)
QUIET = ["--evaluate.prompts", "[]", "--evaluate.every", "null"]


def train(run):
    return llmtune.train(run, devices=jax.devices()[DEVICES])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Eight steps, checkpoints at 4 and 8."""
    directory = tmp_path_factory.mktemp("first")
    train(short_run(directory, "first", [*QUIET, "--train.steps", "8", "--optimizer.learning_rate", "1e-2"]))
    return directory


def following(first, directory, *overrides, name="second"):
    """A run on the earlier one's own files, so that held-out losses can be compared."""
    text = json.loads((first / "first.yaml").read_text())
    text["output"] = str(directory / name)
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(text))
    more = ["--train.steps", "3", "--continue_from", str(first / "first")]
    return llmtune.load_run(path, [*QUIET, "--optimizer.learning_rate", "1e-2", *more, *overrides])


def test_it_begins_where_the_earlier_one_stands_with_another_mixture_and_schedule(first, tmp_path, capsys):
    parts = json.dumps([str(first / "train.jsonl"), {"path": str(first / "validation.jsonl"), "weight": 2}])
    run = following(first, tmp_path, "--data.train", parts, "--optimizer.schedule", "constant", "--train.steps", "6")
    summary = train(run)
    earlier = json.loads((first / "first/evaluation.json").read_text())
    assert summary.before.loss == pytest.approx(earlier["after"]["loss"], rel=1e-6)
    assert earlier["after"]["loss"] < earlier["before"]["loss"] - 0.5
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[0]["learning_rate"] < rows[-1]["learning_rate"]
    assert "loss/validation" in {name for row in rows for name in row}
    facts = json.loads((tmp_path / "second/run.json").read_text())["continued_from"]
    assert facts["run"] == str(first / "first") and facts["step"] == 8
    assert json.loads((tmp_path / "second/export/adapter/provenance.json").read_text())["continued_from"] == facts
    assert "continuing from step 8" in capsys.readouterr().out


def test_an_earlier_step_is_chosen_and_resuming_needs_the_earlier_run_no_more(first, tmp_path):
    run = following(first, tmp_path, "--continue_from", json.dumps({"run": str(first / "first"), "step": 4}))
    summary = train(run)
    newest = following(first, tmp_path, name="newest")
    assert not np.isclose(summary.before.loss, train(newest).before.loss, rtol=1e-4)
    (first / "first").rename(first / "gone")
    try:
        assert train(run).after.loss == summary.after.loss
    finally:
        (first / "gone").rename(first / "first")
    assert json.loads((tmp_path / "second/run.json").read_text())["continued_from"]["step"] == 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--adapt.rank", "8"], r"has other weights that train \(adapt.rank: 4 there, 8 here\)"),
        (["--model", "elsewhere"], "elsewhere"),
        (["--continue_from", "{run: nowhere}"], "nowhere is no llmtune run"),
        (["--continue_from.step", "5"], "--continue_from.step: continue_from is no section"),
    ],
)
def test_what_does_not_fit_is_refused(first, tmp_path, overrides, said):
    with pytest.raises(llmtune.LlmtuneError, match=said):
        train(following(first, tmp_path, *overrides))
    assert not (tmp_path / "second").exists()


def test_a_step_that_is_not_there_or_not_whole_is_refused(first, tmp_path):
    asked = json.dumps({"run": str(first / "first"), "step": 5})
    with pytest.raises(LlmtuneConfigError, match=r"continue_from.step: .* has no checkpoint 5; it has \[8, 4\]"):
        train(following(first, tmp_path, "--continue_from", asked))
    file = next(
        path for path in (first / "first/checkpoints/4").rglob("*") if path.is_file() and path.stat().st_size > 100
    )
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    try:
        with pytest.raises(LlmtuneConfigError, match=r"has no checkpoint to begin with \(step 4: "):
            train(following(first, tmp_path, "--continue_from", json.dumps({"run": str(first / "first"), "step": 4})))
    finally:
        file.write_bytes(content)


def test_of_several_processes_the_first_alone_reads_the_earlier_checkpoint_whole(monkeypatch, tmp_path):
    """The others are told which it is: each of many hosts would otherwise read and hash hundreds of gigabytes."""

    def refuse(path):
        raise AssertionError(f"{path} is read by another process than the first")

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(continuing.steps, "verify_step", refuse)
    monkeypatch.setattr(continuing, "highest", lambda values: [max(8, *values)])
    assert continuing._newest_whole(RunDirectory(tmp_path), [12, 8]) == (8, [])
