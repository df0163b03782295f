"""Plans of rows: each example in exactly one row of an epoch, no row over its length, little padding."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data.packing import BINS, plan_epoch

LIMIT = 64
LENGTHS = st.lists(st.integers(1, LIMIT), min_size=1, max_size=80).map(np.array)
SEEDS, EPOCHS, FLAGS = st.integers(0, 2**31 - 1), st.integers(0, 1000), st.booleans()


def plan(lengths, limit=LIMIT, *, seed=0, epoch=0, packing=True, shuffle=True):
    made = plan_epoch(np.asarray(lengths), limit, seed=seed, epoch=epoch, packing=packing, shuffle=shuffle)
    return [made.row(index).tolist() for index in range(len(made))]


def padding(lengths, limit):
    """The share of all positions that holds no token."""
    return 1 - np.sum(lengths) / (limit * len(plan(lengths, limit)))


@given(LENGTHS, SEEDS, EPOCHS, FLAGS, FLAGS)
def test_each_example_is_in_exactly_one_row_and_no_row_is_too_long(lengths, seed, epoch, packing, shuffle):
    rows = plan(lengths, seed=seed, epoch=epoch, packing=packing, shuffle=shuffle)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= LIMIT for row in rows)


def test_so_it_is_with_many_more_rows_than_are_open_at_a_time():
    lengths = np.random.default_rng(0).integers(1, LIMIT + 1, 6000)
    rows = plan(lengths)
    assert len(rows) > 4 * BINS
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= LIMIT for row in rows)


@given(LENGTHS, SEEDS, EPOCHS, FLAGS, FLAGS)
def test_a_plan_is_a_function_of_seed_epoch_and_lengths_alone(lengths, seed, epoch, packing, shuffle):
    before, options = lengths.copy(), {"seed": seed, "epoch": epoch, "packing": packing, "shuffle": shuffle}
    first = plan(lengths, **options)
    np.random.seed(seed)
    assert plan(lengths.tolist(), **options) == first
    np.testing.assert_array_equal(lengths, before)


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_and_seeds_have_orders_of_their_own(packing):
    lengths = np.full(50, 20)
    plans = [plan(lengths, seed=seed, epoch=epoch, packing=packing) for seed in range(4) for epoch in range(4)]
    assert all(one != other for i, one in enumerate(plans) for other in plans[:i])


@given(LENGTHS, SEEDS, EPOCHS)
def test_without_shuffling_and_packing_rows_are_the_file_in_order(lengths, seed, epoch):
    rows = plan(lengths, seed=seed, epoch=epoch, packing=False, shuffle=False)
    assert rows == [[example] for example in range(len(lengths))]


def test_without_shuffling_packed_rows_begin_in_file_order():
    lengths = np.random.default_rng(1).integers(1, LIMIT + 1, 6000)
    first = [row[0] for row in plan(lengths, shuffle=False)]
    assert first == sorted(first)


def test_an_example_goes_into_the_fullest_row_that_has_room():
    assert plan([40, 50, 10, 24], shuffle=False) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("limit", [512, 1024, 4096])
def test_little_is_lost_to_padding_on_chats_of_very_different_lengths(limit):
    lengths = np.random.default_rng(2).lognormal(5.5, 0.9, 5000).astype(int).clip(8, limit)
    assert padding(lengths, limit) < 0.02


def test_little_is_lost_to_padding_on_real_questions_and_answers(assets):
    rows = map(json.loads, (assets / "data" / "gsm8k_train.jsonl").read_text().splitlines())
    lengths = np.array([(len(row["question"]) + len(row["answer"])) // 4 for row in rows])
    assert padding(lengths, 1024) < 0.02
    unpacked = 1 - lengths.mean() / 1024
    assert unpacked > 0.85
