"""What a run leaves beside its weights: metrics.jsonl, TensorBoard's events, run.json; also when it is interrupted."""

import json

import jax
import pytest
from tensorboardX.event_file_writer import EventFileWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

import llmtune
from llmtune.errors import LlmtuneError
from tests.evaluation.runs import short_run
from tests.training.interruption import train_until

assert EventFileWriter and RecordWriter  # the package that writes is the one whose records are read below


def events(directory):
    """Every event of every file, in the order in which TensorBoard reads them."""
    for path in sorted(directory.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, the record, its checksum
            length = int.from_bytes(content[at : at + 8], "little")
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(directory):
    """{tag: {step: value}} as TensorBoard shows them: a start purges what was written of that step and later."""
    shown = {}
    for event in events(directory):
        if event.HasField("session_log"):
            shown = {tag: {s: v for s, v in own.items() if s < event.step} for tag, own in shown.items()}
        for value in event.summary.value:
            shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Interrupted after step 6, with a checkpoint at 4, and taken up again."""
    directory = tmp_path_factory.mktemp("resumed")
    run = short_run(directory)
    train_until(run, 6)
    unfinished = json.loads((directory / "run" / "run.json").read_text())
    llmtune.train(run, devices=jax.devices()[:1])
    return directory / "run", unfinished


def test_tensorboard_shows_what_metrics_hold_and_forgets_what_was_done_twice(resumed):
    directory, _ = resumed
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    shown = scalars(directory / "tensorboard")
    for tag, name in {
        "train/loss": "loss",
        "train/learning_rate": "learning_rate",
        "evaluation/loss": "eval_loss",
    }.items():
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert shown[tag] == pytest.approx(expected, rel=1e-6), tag
    assert "train/step" not in shown
    purges = [event.step for event in events(directory / "tensorboard") if event.HasField("session_log")]
    assert purges == [1, 5]


def test_run_json_tells_both_sessions(resumed):
    directory, unfinished = resumed
    assert [session["outcome"] for session in unfinished["sessions"]] == ["interrupted"]
    facts = json.loads((directory / "run.json").read_text())
    first, second = facts["sessions"]
    assert first == unfinished["sessions"][0]
    assert (first["first_step"], first["last_step"]) == (0, 4)
    assert (second["first_step"], second["last_step"], second["outcome"]) == (4, 12, "finished")
    for session in (first, second):
        assert session["started"] <= session["ended"]
        assert session["seconds"] > session["compile_seconds"] > 0
        assert session["peak_host_bytes"] > 50e6 and session["peak_device_bytes"] is None  # the CPU counts none
        assert session["versions"]["jax"] == jax.__version__ and session["versions"]["llmtune"] == llmtune.__version__
        assert session["devices"]["kind"] == jax.devices()[0].device_kind and session["devices"]["count"] == 1
    assert facts["steps"] == 12
    assert facts["model"]["trainable_parameters"] < facts["model"]["parameters"] / 5
    counts = facts["data"]["train"]["counts"]
    assert counts["rows"] == 60 and counts["tokens"] > counts["targets"] > 0
    assert facts["data"]["sha256"] == (directory / "data.sha256").read_text().strip()
    assert not list(directory.glob("*.partial"))


def test_a_failed_session_says_why(tmp_path):
    run = short_run(tmp_path)
    train_until(run, 9)
    for file in (tmp_path / "run/checkpoints").rglob("*"):  # of all steps: one alone is fallen back from
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(LlmtuneError):
        llmtune.train(run, devices=jax.devices()[:1])
    last = json.loads((tmp_path / "run/run.json").read_text())["sessions"][-1]
    assert last["outcome"] == "failed" and last["reason"].startswith("LlmtuneError: ") and last["ended"]
