"""Weights are passes through a source per epoch, without repeating before all have come."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data.mixture import Mixture, short_names
from llmtune.data.packing import plan_epoch

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
WEIGHTS = st.floats(0.05, 4)


def rows(mixture, epoch, **options):
    lengths = np.full(sum(mixture.sizes), 10)
    defaults = {"seed": 3, "packing": False, "shuffle": True}
    return plan_epoch(lengths, 64, epoch=epoch, mixture=mixture, **{**defaults, **options}).order.tolist()


def test_weight_one_is_every_example_once_in_the_order_of_no_mixture():
    mixture = Mixture((5, 7), (1, 1))
    assert mixture.choose(0, seed=3, shuffle=False).tolist() == list(range(12))
    assert sorted(rows(mixture, 4)) == list(range(12))


def test_a_quarter_comes_in_four_epochs_each_example_once():
    mixture = Mixture((40, 6), (0.25, 1))
    epochs = [rows(mixture, epoch) for epoch in range(8)]
    small = [[example for example in epoch if example < 40] for epoch in epochs]
    assert [len(part) for part in small] == [10] * 8
    for four in (small[:4], small[4:]):
        assert sorted(example for part in four for example in part) == list(range(40))
    assert small[:4] != small[4:] and all(
        sorted(set(epoch) - set(range(40))) == list(range(40, 46)) for epoch in epochs
    )


def test_weight_three_is_every_example_three_times():
    assert Counter(rows(Mixture((4, 3), (3, 1)), 0)) == {0: 3, 1: 3, 2: 3, 3: 3, 4: 1, 5: 1, 6: 1}


@given(SIZES, st.data())
def test_no_example_is_ahead_of_another_of_its_source_by_more_than_one(sizes, data):
    weights = tuple(data.draw(WEIGHTS) for _ in sizes)
    mixture = Mixture(tuple(sizes), weights)
    seen = Counter(example for epoch in range(4) for example in mixture.choose(epoch, seed=1, shuffle=True).tolist())
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        own = [seen[example] for example in range(start, start + size)]
        assert max(own) - min(own) <= 1 and sum(own) == int(np.floor(4 * weight * size))
        start += size


@given(SIZES, st.integers(0, 100), st.booleans())
def test_an_epoch_is_a_function_of_seed_and_epoch(sizes, epoch, shuffle):
    mixture = Mixture(tuple(sizes), tuple(0.7 for _ in sizes))
    chosen = mixture.choose(epoch, seed=5, shuffle=shuffle)
    np.testing.assert_array_equal(mixture.choose(epoch, seed=5, shuffle=shuffle), chosen)


@pytest.mark.parametrize("packing", [False, True])
def test_without_shuffling_sources_follow_each_other_in_file_order(packing):
    order = rows(Mixture((4, 4), (0.5, 1)), 1, shuffle=False, packing=packing)
    assert order == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["chats.jsonl.gz", "code"], ("chats", "code")),
        (["a/rows.jsonl", "b/rows.jsonl"], ("rows-1", "rows-2")),
        (["a/rows.jsonl", "b/rows.jsonl", "rows-1.txt"], ("rows-1", "rows-2", "rows-1-3")),
    ],
)
def test_each_source_has_a_name_of_its_own(paths, names):
    assert short_names(paths) == names
