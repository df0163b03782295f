"""What a reader must know at a glance, in plain words: how it went, and what may be wrong."""

import math
from dataclasses import dataclass

import numpy as np

from llmtune.evaluation.bootstrap import Interval, difference_interval, loss_interval
from llmtune.evaluation.perplexity import HeldOut, perplexity
from llmtune.evaluation.report.record import Record
from llmtune.evaluation.report.units import CONFIDENCE, GLUE, count, factor, figure, share, span

TURN = 0.02  # nats by which held-out loss must have risen from its lowest point to be called overfitting: 2 % of perplexity
LOSSES = (  # counts of rows that did not come through whole
    ("dropped", "warning", "left out: too long for data.sequence_length"),
    ("skipped", "warning", "skipped"),
    ("truncated", "neutral", "cut to data.sequence_length"),
)
GOOD, NEUTRAL, WARNING, BAD = "good", "neutral", "warning", "bad"


@dataclass(frozen=True)
class Remark:
    """`kind`: good, neutral, warning or bad; `text` is a sentence, `detail` what explains it."""

    kind: str
    text: str
    detail: str = ""


def judge(record: Record) -> list[Remark]:
    """The verdict on one run: the outcome first, then whatever deserves a warning."""
    remarks = [
        _outcome(record),
        *_not_finite(record),
        *_skipped(record),
        *_sources(record),
        *_overfitting(record),
        *_lost_rows(record),
        *_interruptions(record),
    ]
    return remarks if record.finished else [_unfinished(record), *remarks]


def compare(one: Record, other: Record) -> list[Remark]:
    """The verdict on two: which has the lower held-out loss, and whether that can be told at all."""
    unfinished = [
        Remark(WARNING, f"{label} is not finished: {progress(record)}.")
        for label, record in (("A", one), ("B", other))
        if not record.finished
    ]
    if one.after is None or other.after is None:
        text = "There is no validation perplexity of both runs to compare."
        return [Remark(NEUTRAL, text, "It is measured at the end of a run that has data.validation."), *unfinished]
    ends = f"A {with_interval(one.after)}, B {with_interval(other.after)}"
    if validation_hash(one) != validation_hash(other) or validation_hash(one) is None:
        text = f"Validation perplexity after training: {ends}."
        return [Remark(WARNING, text, "They were measured on different examples and cannot be compared."), *unfinished]
    change = difference_interval(one.after, other.after)
    if change is None or not math.isfinite(change.value):
        return [Remark(WARNING, f"Validation perplexity after training: {ends}."), *unfinished]
    better, worse = ("A", "B") if change.value > 0 else ("B", "A")
    if change.bounds is not None and not change.excludes_zero:
        text = f"No measurable difference in validation perplexity after training: {ends}."
        return [Remark(NEUTRAL, text, _ratio(change, "B relative to A")), *unfinished]
    text = f"{better} ends with a lower validation perplexity than {worse}: {ends}."
    return [Remark(GOOD, text, _ratio(change, "B relative to A")), *unfinished]


def with_interval(held_out: HeldOut) -> str:
    """`7.62 (95 % CI 7.11-8.20)`."""
    bounds, value = perplexity_bounds(held_out), held_out.perplexity
    return figure(value) if bounds is None else f"{figure(value)} ({CONFIDENCE}{GLUE}{span(bounds, value)})"


def perplexity_bounds(held_out: HeldOut) -> tuple[float, float] | None:
    """The interval of the perplexity: the exponential of the loss's."""
    bounds = loss_interval(held_out).bounds
    return None if bounds is None else (perplexity(bounds[0]), perplexity(bounds[1]))


def validation_hash(record: Record) -> str | None:
    """Of the held-out examples, as tokens."""
    return record.facts.get("data", {}).get("validation", {}).get("tokens_sha256")


def progress(record: Record) -> str:
    """`step 120 of 400`."""
    return f"step {record.last_step:,} of {record.steps:,}"


def _outcome(record: Record) -> Remark:
    before, after = record.before, record.after
    if before is None or after is None:
        return _training_outcome(record)
    change = difference_interval(before, after)
    values = f"from {with_interval(before)} to {with_interval(after)}"
    if change is None or not math.isfinite(change.value):
        return Remark(BAD, f"Validation perplexity went {values}.")
    detail = _ratio(change, "After relative to before")
    if change.bounds is not None and not change.excludes_zero:
        return Remark(WARNING, f"Validation perplexity did not change measurably: {values}.", detail)
    if change.value < 0:
        return Remark(GOOD, f"Validation perplexity fell {values}.", detail)
    return Remark(BAD, f"Validation perplexity rose {values}: training made the model worse on held-out data.", detail)


def _ratio(change: Interval, of: str) -> str:
    """The change of loss as a factor of perplexity, with the paired interval."""
    text = f"{of}: {factor(math.exp(min(change.value, 700)))}"
    if change.bounds is None:
        return text + "."
    low, high = (factor(math.exp(min(bound, 700))) for bound in sorted(change.bounds, key=abs))
    return f"{text} ({CONFIDENCE}: {low} to {high}), the same examples compared."


def _training_outcome(record: Record) -> Remark:
    _, losses = record.series("loss")
    if len(losses) < 2:
        return Remark(NEUTRAL, "No training step is recorded yet." if not len(losses) else "One training step is done.")
    few = max(1, min(10, len(losses) // 4))
    first, last = float(np.mean(losses[:few])), float(np.mean(losses[-few:]))
    fell = "fell" if last < first else "did not fall"
    text = f"Training loss {fell} from {figure(first)} to {figure(last)} over {record.last_step:,} steps."
    _, held_out = record.series("eval_loss")
    if len(held_out):
        return Remark(NEUTRAL, text, f"Held-out loss, last measured: {figure(float(held_out[-1]))}.")
    known = record.before is not None
    missing = (
        "" if known else "There is no data.validation, so nothing says what the model does on text it has not seen."
    )
    return Remark(NEUTRAL if last < first else WARNING, text, missing)


def _not_finite(record: Record) -> list[Remark]:
    bad = [row["step"] for row in record.rows if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"])]
    if not bad:
        return []
    text = f"The loss or its gradient was not finite in {count(len(bad), 'step')}, first at step {bad[0]:,}."
    return [Remark(BAD, text, "Try a lower learning rate, a longer warmup, gradient clipping, or float32.")]


def _skipped(record: Record) -> list[Remark]:
    steps = [row["step"] for row in record.rows if row.get("skipped")]
    if not steps:
        return []
    were = "was" if len(steps) == 1 else "were"
    text = f"{count(len(steps), 'step')} changed nothing and {were} skipped, the first of them step {steps[0]:,}."
    return [Remark(WARNING, text, "The loss or its gradient was not finite, or rose too far.")]


def _sources(record: Record) -> list[Remark]:
    """Sources of a mixture whose training loss ends above where it began."""
    risen = []
    for name in record.names_after("loss/"):
        _, losses = record.series(f"loss/{name}")
        few = max(1, min(20, len(losses) // 4))
        if len(losses) >= 8 and float(np.mean(losses[-few:])) > float(np.mean(losses[:few])) + TURN:
            risen.append(f"{name} ({figure(float(np.mean(losses[:few])))} to {figure(float(np.mean(losses[-few:])))})")
    if not risen:
        return []
    return [
        Remark(
            WARNING, f"The training loss of a source of the mixture rose: {', '.join(risen)}.", "Give it more weight."
        )
    ]


def _overfitting(record: Record) -> list[Remark]:
    steps, losses = record.evaluation_curve()
    if len(losses) < 3 or not np.isfinite(losses).all() or losses[-1] - losses.min() < TURN:
        return []
    lowest = int(losses.argmin())
    if lowest == 0:
        return []  # it never fell: said already
    text = (
        f"Evaluation loss turned upwards: lowest at step {int(steps[lowest]):,} ({figure(float(losses[lowest]))}), "
        f"{figure(float(losses[-1]))} at step {int(steps[-1]):,}."
    )
    return [Remark(WARNING, text, "This is overfitting: fewer steps, a lower learning rate or more data may help.")]


def _lost_rows(record: Record) -> list[Remark]:
    remarks = []
    for part, name in (("train", "training"), ("validation", "validation")):
        counts = record.facts.get("data", {}).get(part, {}).get("counts", {})
        for lost, kind, what in LOSSES:
            number = counts.get(lost) or 0
            number = sum(number.values()) if isinstance(number, dict) else number
            if number:
                rows, were = counts["rows"], "was" if number == 1 else "were"
                text = f"{number:,} of {count(rows, f'{name} row')} ({share(number, rows)}) {were} {what}."
                remarks.append(Remark(kind, text))
    return remarks + _partial_validation(record)


def _partial_validation(record: Record) -> list[Remark]:
    limit = (record.config.get("evaluate") or {}).get("max_batches")
    if limit is None or record.before is None:
        return []
    used, part = len(record.before.targets), record.facts.get("data", {}).get("validation", {})
    whole = part.get("counts", {}).get("examples", 0)
    if used >= whole:
        return []
    return [Remark(NEUTRAL, f"Validation used {used:,} of {whole:,} examples (evaluate.max_batches: {limit}).")]


def _interruptions(record: Record) -> list[Remark]:
    resumed = [session["first_step"] for session in record.working_sessions if session.get("first_step")]
    if not resumed:
        return []
    where = ", ".join(f"{step:,}" for step in resumed)
    return [Remark(NEUTRAL, f"The run was interrupted and taken up again after step {where}.")]


def _unfinished(record: Record) -> Remark:
    last = record.sessions[-1] if record.sessions else {}
    outcome, reason = last.get("outcome", "running"), last.get("reason", "")
    said = {"failed": f"it failed ({reason})", "interrupted": "it was interrupted"}.get(
        outcome, "it is still going on, or was killed"
    )
    text = f"This run is not finished: {progress(record)}; {said}."
    return Remark(WARNING, text, "The same `llmtune train` command takes it up again.")
