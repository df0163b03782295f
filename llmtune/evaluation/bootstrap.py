"""How sure a held-out loss is: a bootstrap over the held-out examples.

    examples drawn with replacement, as many as there are  -->  sum of losses / sum of targets  -->  its percentiles

An example is drawn whole, since tokens of one text are not independent. Two models measured on the same examples are compared
with the same draws (paired): most of what makes one example harder than another cancels, and a small gain shows.
Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 6, 8 and 13.
"""

from dataclasses import dataclass

import numpy as np

from llmtune.evaluation.perplexity import HeldOut

DRAWS, LEVEL, SEED = 2000, 0.95, 0
GROUPS = 10_000  # more examples than this are drawn in groups of neighbours, which costs no precision worth having
CELLS = 4_000_000  # drawn indices held at a time


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that holds it with 95 % confidence; None where there are fewer than two examples."""

    value: float
    bounds: tuple[float, float] | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.bounds is not None and (self.bounds[0] > 0 or self.bounds[1] < 0)


def loss_interval(held_out: HeldOut) -> Interval:
    """The loss in nats per target token."""
    return Interval(held_out.loss, _percentiles(_ratios(held_out.losses[None], held_out.targets)[0]))


def difference_interval(before: HeldOut, after: HeldOut) -> Interval | None:
    """Loss after minus loss before, paired; None where they were not measured on the same examples."""
    if not np.array_equal(before.targets, after.targets):
        return None
    drawn = _ratios(np.stack([before.losses, after.losses]), before.targets)
    return Interval(after.loss - before.loss, _percentiles(drawn[1] - drawn[0]))


def _ratios(losses: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[models, examples] and [examples] -> [models, DRAWS]: the loss of each under the same draws."""
    sums = np.concatenate([losses, targets[None]])
    count = sums.shape[1]
    if count < 2:
        return np.zeros((len(losses), 0))
    if count > GROUPS:
        sums = np.add.reduceat(sums, np.arange(GROUPS) * count // GROUPS, axis=1)
        count = GROUPS
    random, drawn = np.random.default_rng(SEED), []
    at_once = max(1, CELLS // count)
    for start in range(0, DRAWS, at_once):
        chosen = random.integers(count, size=(min(at_once, DRAWS - start), count))
        drawn.append(np.stack([own[chosen].sum(axis=1) for own in sums]))
    totals = np.concatenate(drawn, axis=1)
    return totals[:-1] / totals[-1]


def _percentiles(drawn: np.ndarray) -> tuple[float, float] | None:
    if not drawn.size or not np.isfinite(drawn).all():
        return None
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
