"""Batches are a pure function of the step: random access, resuming and any number of hosts see the same rows."""

import itertools

import numpy as np
import pytest

from llmtune.data import BatchSource, evaluation_batches, read_batches
from llmtune.data.dataset import collect
from llmtune.data.example import IGNORED, Example

LIMIT, COUNT = 32, 57


def make_dataset(lengths):
    """Token k of example i is 1000 i + k + 1, so that a token tells where it belongs."""
    examples = []
    for index, length in enumerate(lengths):
        ids = np.arange(1000 * index + 1, 1000 * index + 1 + length, dtype=np.int32)
        labels = np.where(np.arange(length) < index % 3, IGNORED, ids).astype(np.int32)
        examples.append(Example(ids, labels, f"rows.jsonl:{index + 1}"))
    return collect(examples, LIMIT, "error", name="data.train")


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(np.random.default_rng(0).integers(4, LIMIT + 1, COUNT))


def source(dataset, *, batch_size=8, packing=True, shuffle=True, steps=20, **hosts):
    return BatchSource(dataset, batch_size, LIMIT, 3, packing, shuffle, steps, **hosts)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == np.int32
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def documents(batch):
    """Examples of a batch in order, each checked against everything that is said about it."""
    found = []
    for tokens, labels, segments, positions in zip(
        *(batch[name] for name in ("tokens", "labels", "segment_ids", "positions")), strict=True
    ):
        count = segments.max()
        assert sorted(set(segments) - {0}) == list(range(1, count + 1))
        padding = segments == 0
        assert np.all(np.diff(segments[~padding]) >= 0) and np.all(padding == (np.arange(LIMIT) >= np.sum(~padding)))
        assert np.all(tokens[padding] == 0) and np.all(labels[padding] == IGNORED) and np.all(positions[padding] == 0)
        for segment in range(1, count + 1):
            own = segments == segment
            example = int(tokens[own][0]) // 1000
            np.testing.assert_array_equal(tokens[own], 1000 * example + 1 + np.arange(own.sum()))
            np.testing.assert_array_equal(positions[own], np.arange(own.sum()))
            expected = np.where(np.arange(own.sum()) < max(1, example % 3), IGNORED, tokens[own])
            np.testing.assert_array_equal(labels[own], expected)
            found.append((example, int(own.sum())))
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_documents_are_whole_count_from_zero_and_ignore_their_first_label(dataset, packing):
    batches = source(dataset, packing=packing)
    for step in range(len(batches)):
        for example, length in documents(batches[step]):
            assert length == dataset.lengths[example]
        assert batches[step]["tokens"].shape == (8, LIMIT)
        assert packing or batches[step]["segment_ids"].max() == 1


def test_packed_rows_hold_several_documents(dataset):
    assert source(make_dataset([4] * 80))[0]["segment_ids"].max() == LIMIT // 4


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_slices_of_all_hosts_are_the_global_batch(dataset, packing, hosts):
    whole = source(dataset, packing=packing)
    parts = [source(dataset, packing=packing, share=share) for share in np.split(np.arange(8), hosts)]
    for step in range(len(whole)):
        slices = [part[step] for part in parts]
        assert_equal({name: np.concatenate([own[name] for own in slices]) for name in slices[0]}, whole[step])


@pytest.mark.parametrize("packing", [False, True])
def test_reading_in_order_is_the_same_as_random_access(dataset, packing):
    order = list(read_batches(source(dataset, packing=packing), 0))
    assert len(order) == 20
    access = source(dataset, packing=packing)
    for step in np.random.default_rng(0).permutation(20):
        assert_equal(access[step], order[step])


@pytest.mark.parametrize("start", [1, 6, 7, 19, 20])
def test_resuming_at_a_step_reads_what_would_have_come(dataset, start):
    whole = list(read_batches(source(dataset), 0))
    resumed = list(read_batches(source(dataset), start))
    assert len(resumed) == 20 - start
    for one, other in zip(resumed, whole[start:], strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_follow_each_other_each_complete_and_in_its_own_order(dataset, packing):
    """Over the steps of three epochs and a bit: no example is missing, none comes twice, no batch is short."""
    batches = source(dataset, packing=packing, batch_size=1, steps=10**6)
    ends = [batches.rows_in(epochs) for epochs in range(4)]
    stream = [
        [example for row in range(first, end) for example, _ in documents(batches[row])]
        for first, end in itertools.pairwise(ends)
    ]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in stream)
    assert stream[0] != stream[1] != stream[2] != stream[0]
    large = source(dataset, packing=packing)
    for step in range(ends[-1] // 8 + 2):
        rows = [batches[8 * step + k] for k in range(8)]
        assert_equal({name: np.concatenate([own[name] for own in rows]) for name in rows[0]}, large[step])


def test_without_packing_and_shuffling_rows_come_in_file_order_again_and_again(dataset):
    batches = source(dataset, packing=False, shuffle=False)
    order = [example for step in range(20) for example, _ in documents(batches[step])]
    assert order == [row % COUNT for row in range(20 * 8)]


def test_parts_of_epochs_are_rounded_up_to_rows(dataset):
    rows = source(dataset, packing=False)
    assert [rows.rows_in(epochs) for epochs in (0.01, 0.5, 1, 1.5, 2, 2.01)] == [1, 29, 57, 86, 114, 115]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_holds_each_example_once_and_fills_up_with_padding(dataset, batch_size):
    batches = evaluation_batches(dataset, batch_size, LIMIT, None)
    found = [document for batch in batches for document in documents(batch)]
    assert sorted(found) == list(enumerate(dataset.lengths))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, LIMIT)}
    targets = sum(np.count_nonzero(batch["labels"] != IGNORED) for batch in batches)
    assert targets == dataset.counts.targets
    limited = evaluation_batches(dataset, batch_size, LIMIT, 1)
    assert len(limited) == 1
    assert_equal(limited[0], batches[0])
