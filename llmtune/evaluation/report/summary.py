"""The report in a few lines, for a terminal."""

from pathlib import Path

from llmtune.evaluation.report.record import read_record
from llmtune.evaluation.report.tables import differences, tiles
from llmtune.evaluation.report.verdict import Remark, compare, judge

MARKS = {"good": "+", "neutral": "-", "warning": "!", "bad": "!!"}


def summarize(run: str | Path, other: str | Path | None = None) -> str:
    """The verdict and the figures of one run, or the verdict on two and what they differ in."""
    one = read_record(run)
    if other is None:
        figures = [f"  {tile.label}: {tile.value} ({tile.note})" for tile in tiles(one)]
        return "\n".join([*map(_line, judge(one)), *figures])
    two = read_record(other)
    differing = [f"  {name}: {left!r} in A, {right!r} in B" for name, left, right in differences(one, two)]
    names = [f"A: {one.path}", f"B: {two.path}"]
    return "\n".join([*names, *map(_line, compare(one, two)), *(differing or ["  nothing differs"])])


def _line(remark: Remark) -> str:
    return f"{MARKS[remark.kind]} {remark.text}" + (f" {remark.detail}" if remark.detail else "")
