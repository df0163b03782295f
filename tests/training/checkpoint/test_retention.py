"""Which steps stay."""

import math

import pytest

from llmtune.config.checkpoint import Best
from llmtune.training.checkpoint.retention import Retention

FIGURES = {10: {"eval_loss": 2.0}, 20: {"eval_loss": 1.0}, 30: {"eval_loss": 1.0}, 40: {}, 50: {"eval_loss": math.nan}}


@pytest.mark.parametrize(
    ("retention", "goes"),
    [
        (Retention(2), [10, 20, 30]),
        (Retention(9), []),
        (Retention(1, Best(n=1)), [10, 30, 40]),
        (Retention(1, Best(n=2)), [10, 40]),
        (Retention(1, Best(n=1, mode="max")), [20, 30, 40]),
        (Retention(1, Best(metric="accuracy")), [10, 20, 30, 40]),
    ],
)
def test_the_newest_and_the_best_stay(retention, goes):
    assert retention.removable(FIGURES) == goes
