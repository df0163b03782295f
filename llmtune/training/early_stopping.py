"""The end of a run whose figure no longer gets better: a pure function of what was measured, so that a resumed run agrees."""

from collections.abc import Iterable
from typing import Any

from llmtune.config.regularize import EarlyStopping
from llmtune.errors import LlmtuneConfigError


def is_over(rule: EarlyStopping | None, rows: Iterable[dict[str, Any]]) -> bool:
    """Whether the last `patience` measurements are no better, by `min_delta`, than the best before them."""
    if rule is None:
        return False
    sign, best, since = 1 if rule.mode == "min" else -1, None, 0
    for row in rows:
        value = row.get(rule.metric)
        if value is None:
            continue
        if best is None or sign * value < best - rule.min_delta:
            best, since = sign * value, 0
        else:
            since += 1
    return since >= rule.patience


class Plateau:
    """Watches the rows of a run that goes on after `rows`."""

    def __init__(self, rule: EarlyStopping | None, rows: Iterable[dict[str, Any]]):
        self._rule = rule
        self._rows = [] if rule is None else [row for row in rows if rule.metric in row]
        self.is_reached = is_over(rule, self._rows)

    @property
    def reason(self) -> str:
        """What a person reads of it."""
        assert self._rule is not None
        return f"{self._rule.metric} was no better {self._rule.patience} times in a row"

    def see(self, row: dict[str, Any], *, evaluated: bool) -> bool:
        """Whether the run should end with this row. `evaluated`: held-out data was measured.

        Raises LlmtuneConfigError where the row, which should hold the figure, does not.
        """
        rule = self._rule
        if rule is None:
            return False
        if rule.metric not in row and (evaluated or not rule.metric.startswith("eval_")):
            raise LlmtuneConfigError(
                f"early_stopping.metric: {rule.metric!r} is no figure of this run's metrics.jsonl; there are {', '.join(row)}"
            )
        self._rows += [row] if rule.metric in row else []
        self.is_reached = is_over(rule, self._rows)
        return self.is_reached
