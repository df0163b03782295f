"""The lines that a reader sees first: right where all went well, and a warning for each thing that may be wrong."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmtune.evaluation.perplexity import HeldOut
from llmtune.evaluation.report.record import Record
from llmtune.evaluation.report.units import count, duration, factor, figure, parameters, share, size, span
from llmtune.evaluation.report.verdict import compare, judge

TARGETS = np.full(50, 10.0)
FINISHED = {"outcome": "finished", "first_step": 0, "started": "2026-01-01T00:00:00+00:00", "seconds": 9.0}


def measured(loss, seed=0):
    noise = np.random.default_rng(seed).normal(0, 0.3, 50)
    return HeldOut(TARGETS * (loss + noise - noise.mean()), TARGETS)


def row(step, loss=2.0, **more):
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": 64,
        "target_tokens": 32,
        **more,
    }


def record(before=3.5, after=2.0, evaluations=(), losses=(3.0, 2.5, 2.0, 1.9), hash="same", **facts):
    rows = [row(step, loss) for step, loss in enumerate(losses, 1)]
    for step, loss in evaluations:
        rows[step - 1]["eval_loss"] = loss
    before, after = (
        None if loss is None else loss if isinstance(loss, HeldOut) else measured(loss) for loss in (before, after)
    )
    data = {"validation": {"tokens_sha256": hash, "counts": {"rows": 50, "examples": 50}}}
    facts = {"steps": len(rows), "sessions": [FINISHED], "data": data, **facts}
    return Record(Path("runs/some"), {"model": "m", "data": {"train": "x"}}, rows, facts, {}, before, after)


def test_a_fall_is_good_news_and_nothing_else_is_said():
    (remark,) = judge(record())
    assert remark.kind == "good"
    plain = remark.text.replace("\N{NO-BREAK SPACE}", " ")
    assert plain.startswith("Validation perplexity fell from 33.1 (95 % CI 30.") and " to 7.39 (95 % CI 6." in plain
    assert remark.detail.startswith("After relative to before: 4.48 times lower (95")


def test_a_rise_is_a_problem():
    (remark, *_) = judge(record(2.0, 2.2))
    assert remark.kind == "bad" and "rose from 7.39" in remark.text and "22.1 % higher" in remark.detail


def test_what_lies_within_chance_is_no_fall():
    (remark,) = judge(record(measured(2.0, seed=1), measured(1.99, seed=2)))
    assert remark.kind == "warning" and "did not change measurably" in remark.text


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    broken = HeldOut(np.full(50, np.nan), TARGETS)
    remarks = judge(record(after=broken, losses=(3.0, float("nan"), float("nan"), 2.0)))
    assert [remark.kind for remark in remarks] == ["bad", "bad"]
    assert "to not finite" in remarks[0].text and "not finite in 2 steps, first at step 2" in remarks[1].text


def test_evaluation_loss_that_turns_upwards_is_overfitting():
    remarks = judge(record(after=2.4, evaluations=[(2, 2.0), (4, 2.4)]))
    assert [remark.kind for remark in remarks] == ["good", "warning"]
    assert "turned upwards: lowest at step 2 (2.00), 2.40 at step 4" in remarks[1].text
    assert len(judge(record(after=2.01, evaluations=[(2, 2.0), (4, 2.01)]))) == 1  # a wobble


@pytest.mark.parametrize(
    "counts, kind, said",
    [
        ({"dropped": 3}, "warning", "3 of 200 training rows (1.5 %) were left out: too long"),
        ({"truncated": 1}, "neutral", "1 of 200 training rows (0.5 %) was cut"),
        ({"skipped": {"no target": 4, "null": 2}}, "warning", "6 of 200 training rows (3.0 %) were skipped"),
    ],
)
def test_rows_that_did_not_come_through_are_counted(counts, kind, said):
    remark = judge(record(data={"train": {"counts": {"rows": 200, **counts}}}))[-1]
    assert remark.kind == kind and remark.text.startswith(said)


def test_without_validation_the_training_loss_speaks():
    (remark,) = judge(record(None, None))
    assert remark.kind == "neutral" and "Training loss fell from 3.00 to 1.90 over 4 steps" in remark.text
    assert "no data.validation" in remark.detail
    (remark,) = judge(record(None, None, losses=(2.0, 2.0, 3.0, 3.0)))
    assert remark.kind == "warning" and "did not fall" in remark.text


@pytest.mark.parametrize("outcome, said", [("running", "going on, or was killed"), ("failed", "it failed (no space)")])
def test_an_unfinished_run_is_told_first(outcome, said):
    session = {**FINISHED, "outcome": outcome, "reason": "no space"}
    first = judge(record(3.5, None, sessions=[session], steps=10))[0]
    assert first.kind == "warning" and "not finished: step 4 of 10" in first.text and said in first.text


def test_two_runs_on_the_same_examples_are_compared_in_pairs():
    (remark,) = compare(record(after=2.0), record(after=2.1))
    assert remark.kind == "good" and remark.text.startswith("A ends with a lower validation perplexity than B: A 7.39")
    assert "B relative to A: 10.5 % higher" in remark.detail
    (remark,) = compare(record(after=2.1), record(after=2.0))
    assert remark.text.startswith("B ends with a lower")
    (remark,) = compare(record(after=measured(2.0, 1)), record(after=measured(2.0, 2)))
    assert remark.text.startswith("No measurable difference")
    (remark,) = compare(record(hash="one"), record(hash="other"))
    assert remark.kind == "warning" and "different examples" in remark.detail
    going_on = dataclasses.replace(record(after=None), facts={"sessions": [{**FINISHED, "outcome": "running"}]})
    assert "B is not finished" in compare(record(), going_on)[1].text


def test_figures_are_written_as_people_read_them():
    assert [figure(v) for v in (33.14, 7.618, 158768, 0.0132, 0, 1.2e-5, -0.5, float("inf"), float("nan"))] == [
        "33.1", "7.62", "159,000", "0.0132", "0.00", "0.000012", "\N{MINUS SIGN}0.500", "\N{INFINITY}", "not finite",
    ]  # fmt: skip
    assert span((30.21, 36.4), 33.1) == "30.2\N{EN DASH}36.4" and span(None, 1) == ""
    assert span((-0.1, 0.1), 0.1) == "\N{MINUS SIGN}0.100 to 0.100"
    assert [duration(s) for s in (0.0042, 0.82, 4.24, 48.4, 60, 192, 7500)] == [
        "4.2 ms", "820 ms", "4.2 s", "48 s", "1 min", "3 min 12 s", "2 h 05 min",
    ]  # fmt: skip
    assert [size(b) for b in (12, 8.1e8, 1.42e9)] == ["12 B", "810 MB", "1.42 GB"]
    assert [parameters(n) for n in (512, 260_000, 8.03e9)] == ["512", "260 k", "8.03 B"]
    assert [factor(v) for v in (0.938, 1.014, 1 / 133, 2.5, 0)] == [
        "6.2 % lower", "1.4 % higher", "133 times lower", "2.50 times higher", "\N{INFINITY} times lower",
    ]  # fmt: skip
    assert (count(1, "row"), count(7473, "row"), share(1, 5000), share(37, 1500)) == (
        "1 row",
        "7,473 rows",
        "< 0.1 %",
        "2.5 %",
    )
