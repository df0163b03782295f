"""What a key of the configuration may name among the figures of metrics.jsonl."""

from typing import Any

from llmtune.errors import LlmtuneConfigError

BY_SOURCE = ("loss/", "target_tokens/")  # of a mixture: where a batch has none of a source, its row has no such figure


def require_figure(key: str, metric: str, row: dict[str, Any]) -> None:
    """Raises LlmtuneConfigError where no row of the run will have the figure, as far as one of them tells."""
    comes_later = metric.startswith(BY_SOURCE) or (metric.startswith("eval_") and "eval_loss" not in row)
    if metric not in row and not comes_later:
        raise LlmtuneConfigError(
            f"{key}: {metric!r} is no figure of this run's metrics.jsonl; there are {', '.join(row)}"
        )
