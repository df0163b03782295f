"""Confidence intervals of held-out losses, against scipy's bootstrap, against drawing by hand, and against the truth."""

import numpy as np
import pytest
import scipy.stats

from llmtune.evaluation import bootstrap
from llmtune.evaluation.bootstrap import difference_interval, loss_interval
from llmtune.evaluation.perplexity import HeldOut


def examples(seed, count=80, harder=0.0):
    """Sums of losses that grow with the number of targets, each example with a difficulty of its own."""
    random = np.random.default_rng(seed)
    targets = random.integers(1, 40, count).astype(np.float64)
    return HeldOut(targets * (random.gamma(4.0, 0.5, count) + harder), targets)


def test_the_interval_is_scipys():
    held_out = examples(1)
    given = scipy.stats.bootstrap(
        (held_out.losses, held_out.targets),
        lambda losses, targets, axis: losses.sum(axis) / targets.sum(axis),
        paired=True, n_resamples=20_000, method="percentile", rng=5,
    ).confidence_interval  # fmt: skip
    own = loss_interval(held_out)
    assert own.value == pytest.approx(held_out.losses.sum() / held_out.targets.sum(), rel=1e-12)
    assert own.bounds == pytest.approx((given.low, given.high), abs=0.12 * (given.high - given.low))


def test_the_paired_interval_is_that_of_drawing_the_same_examples_by_hand():
    before = examples(2)
    random = np.random.default_rng(3)
    after = HeldOut(before.losses * random.uniform(0.7, 1.05, len(before.losses)), before.targets)
    drawn = []
    for _ in range(4000):
        rows = random.integers(80, size=80)
        of = before.targets[rows].sum()
        drawn.append(after.losses[rows].sum() / of - before.losses[rows].sum() / of)
    low, high = np.quantile(drawn, [0.025, 0.975])
    own = difference_interval(before, after)
    assert own.value == pytest.approx(after.loss - before.loss, rel=1e-12)
    assert own.bounds == pytest.approx((low, high), abs=0.12 * (high - low))
    assert own.excludes_zero
    apart = loss_interval(before).bounds[1] - loss_interval(before).bounds[0]
    assert own.bounds[1] - own.bounds[0] < apart / 2  # what pairing is for


def test_ninety_five_intervals_of_a_hundred_hold_the_truth():
    truth = 2.0  # gamma(4, 0.5)
    held = [loss_interval(examples(seed)).bounds for seed in range(100, 300)]
    share = np.mean([low <= truth <= high for low, high in held])
    assert 0.88 <= share <= 0.99


def test_the_same_figures_give_the_same_interval():
    assert loss_interval(examples(4)) == loss_interval(examples(4))


def test_many_examples_are_drawn_in_groups_and_the_interval_stays(monkeypatch):
    held_out = examples(5, count=3000)
    whole = loss_interval(held_out).bounds
    monkeypatch.setattr(bootstrap, "GROUPS", 500)
    grouped = loss_interval(held_out).bounds
    assert grouped == pytest.approx(whole, abs=0.15 * (whole[1] - whole[0]))


def test_what_allows_no_interval_has_none():
    one = HeldOut(np.array([3.0]), np.array([2.0]))
    assert loss_interval(one).bounds is None and loss_interval(one).value == 1.5
    nothing = HeldOut(np.zeros(0), np.zeros(0))
    assert loss_interval(nothing).bounds is None and nothing.loss == 0.0
    broken = HeldOut(np.array([np.nan, 1.0]), np.array([1.0, 1.0]))
    assert loss_interval(broken).bounds is None and np.isnan(broken.perplexity)
    assert difference_interval(examples(6), examples(7)) is None  # other examples: not paired
