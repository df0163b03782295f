"""Runs over streamed data: a mixture, killed and taken up again, equals the run that was left alone; positions may be lost."""

import json

import jax
import pytest

import llmtune
from llmtune.errors import LlmtuneConfigError
from tests.evaluation.runs import short_run
from tests.training.interruption import train_until

PLAIN = ["--evaluate.prompts", "[]", "--evaluate.every", "null", "--adapt", "null", "--objective", "pretrain"]


def streamed(directory, name="run", *overrides):
    """A directory of three files and a fourth file of its own, half as many tokens."""
    short_run(directory, name)
    shards = directory / "shards"
    shards.mkdir(exist_ok=True)
    lines = (directory / "train.jsonl").read_text().splitlines(keepends=True)
    for part in range(3):
        (shards / f"{part}.jsonl").write_text("".join(lines[part::3]))
    parts = json.dumps([{"path": str(shards), "weight": 2}, {"path": str(directory / "validation.jsonl"), "weight": 1}])
    stream = ["--data.streaming", "true", "--data.train", parts, "--data.sequence_length", "64", "--train.steps", "10"]
    return llmtune.load_run(directory / f"{name}.yaml", [*PLAIN, *stream, "--checkpoint.every", "4", *overrides])


def curve(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["epoch"]) for row in rows]


def test_a_stream_is_taken_up_where_it_was_left(tmp_path):
    whole = streamed(tmp_path, "whole")
    llmtune.train(whole, devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (tmp_path / "whole/positions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11)) and rows[-1]["drawn"][0] > 1.5 * rows[-1]["drawn"][1]
    assert sum(rows[-1]["drawn"]) == 10 * 4 * 64
    for name in ("kept", "lost"):
        run = streamed(tmp_path, name)
        train_until(run, 6)
        if name == "lost":  # it is found again from the beginning
            (tmp_path / name / "positions.jsonl").unlink()
        llmtune.train(run, devices=jax.devices()[:1])
        assert curve(tmp_path / name) == curve(tmp_path / "whole")
    facts = json.loads((tmp_path / "whole/run.json").read_text())["data"]["train"]
    assert facts["counts"] == {} and len(facts["sources"][0]["files"]) == 3
    metrics = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert {"loss/shards", "loss/validation"} <= {key for row in metrics for key in row}
    (tmp_path / "shards/1.jsonl").write_text("{}\n")
    with pytest.raises(LlmtuneConfigError, match="other data"):
        llmtune.train(whole)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--objective", "sft"], "data.streaming: objective sft needs its rows whole"),
        (["--data.packing", "false"], "data.streaming: a stream is packed as it comes"),
        (["--train.epochs", "2", "--train.steps", "null"], "train.epochs: a stream has no known length"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, overrides, said):
    with pytest.raises(LlmtuneConfigError, match=said):
        streamed(tmp_path, "run", *overrides)
