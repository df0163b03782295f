"""A run of many epochs holds the plans of two, and knows every row of all of them."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llmtune.data.epochs import HELD, Epochs
from llmtune.data.packing import Plan


def make(epoch):
    """Epoch e has e % 3 + 1 rows, each of one example: its epoch and its place."""
    rows = epoch % 3 + 1
    return Plan(10 * epoch + np.arange(rows), np.arange(rows + 1))


def all_rows(epochs):
    return [10 * epoch + row for epoch in range(epochs) for row in range(epoch % 3 + 1)]


def test_rows_follow_each_other_without_a_gap():
    epochs, expected = Epochs(make), all_rows(60)
    order = np.random.default_rng(0).permutation(len(expected))
    for index in [*range(len(expected)), *order]:
        plan, row = epochs.row(int(index))
        assert plan.row(row).tolist() == [expected[index]]
        assert epochs.passed(int(index)) == expected[index] // 10 + expected[index] % 10 / len(plan)
    assert [epochs.rows_before(epoch) for epoch in range(7)] == [0, 1, 3, 6, 7, 9, 12]


def test_threads_that_ask_at_once_make_a_plan_once():
    made = []

    def slowly(epoch):
        made.append(epoch)
        time.sleep(0.1)  # the others' turn
        return make(epoch)

    epochs = Epochs(slowly)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(epochs.row, [1, 2, 1, 2, 1, 2, 1, 2]))
    assert [int(plan.row(row)[0]) for plan, row in found] == [10, 11] * 4 and made == [0, 1]


def test_many_epochs_hold_no_more_plans_than_two():
    made = []
    epochs = Epochs(lambda epoch: made.append(epoch) or make(epoch))
    for index in range(1998):
        epochs.row(index)
    assert made == list(range(999)) and len(epochs._plans) == HELD
