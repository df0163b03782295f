"""The end of a run whose figure no longer gets better: a pure function of what was measured, so that a resumed run agrees."""

from collections.abc import Iterable
from typing import Any

from llmtune.config.regularize import EarlyStopping
from llmtune.training.figures import require_figure


class Plateau:
    """Whether the last `patience` measurements are no better, by `min_delta`, than the best before them.

    `rows`: of a run that goes on after them. Without a rule there is never a plateau. What is no number is no better.
    """

    def __init__(self, rule: EarlyStopping | None, rows: Iterable[dict[str, Any]]):
        self._rule = rule
        self._best, self._since = float("inf"), 0
        for row in rows:
            self._measure(row)

    @property
    def is_reached(self) -> bool:
        """As of the last row."""
        return self._rule is not None and self._since >= self._rule.patience

    @property
    def reason(self) -> str:
        """What a person reads of it."""
        assert self._rule is not None
        return f"{self._rule.metric} was no better {self._rule.patience} times in a row"

    def see(self, row: dict[str, Any]) -> bool:
        """Whether the run should end with this row. Raises LlmtuneConfigError where the row should hold the figure."""
        if self._rule is not None:
            require_figure("early_stopping.metric", self._rule.metric, row)
            self._measure(row)
        return self.is_reached

    def _measure(self, row: dict[str, Any]) -> None:
        rule = self._rule
        if rule is None or rule.metric not in row:
            return
        value = row[rule.metric] * (1 if rule.mode == "min" else -1)
        if value < self._best - rule.min_delta:
            self._best, self._since = value, 0
        else:
            self._since += 1
