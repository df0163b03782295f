"""Examples are fitted to the sequence length, and the counts say what became of the rows."""

import numpy as np
import pytest

from llmtune.data.dataset import collect, join
from llmtune.data.example import IGNORED, Example
from llmtune.data.mixture import Mixture
from llmtune.errors import LlmtuneDataError

LIMIT = 8


def example(length, *, prompt=1, line=1, cut="end"):
    """Ids 100, 101, ...; the first `prompt` of them are no targets."""
    ids = np.arange(100, 100 + length, dtype=np.int32)
    labels = np.where(np.arange(length) < prompt, IGNORED, ids).astype(np.int32)
    return Example(ids, labels, f"rows.jsonl:{line}", cut)


def contents(dataset):
    return [tuple(part.tolist() for part in dataset.example(index)) for index in range(len(dataset))]


def test_what_fits_is_kept_as_it_is():
    given = [example(3), example(LIMIT), example(2)]
    dataset = collect(given, LIMIT, "error", name="data.train")
    assert contents(dataset) == [(one.input_ids.tolist(), one.labels.tolist()) for one in given]
    assert dataset.lengths.tolist() == [3, LIMIT, 2]
    counts = dataset.counts
    assert (counts.rows, counts.examples, counts.tokens, counts.targets) == (3, 3, 13, 10)
    assert (counts.truncated, counts.dropped, counts.split) == (0, 0, 0)
    assert counts.describe() == "3 rows, 13 tokens (10 targets)"


def test_long_rows_are_cut_and_counted():
    dataset = collect([example(LIMIT + 5, prompt=3), example(4)], LIMIT, "truncate", name="data.train")
    ids = list(range(100, 100 + LIMIT))
    assert contents(dataset)[0] == (ids, [IGNORED] * 3 + ids[3:])
    assert (dataset.counts.rows, dataset.counts.truncated, dataset.counts.tokens) == (2, 1, LIMIT + 4)
    assert dataset.counts.describe() == "2 rows, 12 tokens (8 targets), 1 truncated"


def test_a_row_whose_targets_are_all_cut_off_is_dropped_and_counted():
    """An example without a target would teach nothing; so would one whose only target is its first token."""
    rows = [example(LIMIT + 5, prompt=LIMIT), example(LIMIT + 5, prompt=LIMIT - 1), example(4)]
    dataset = collect(rows, LIMIT, "truncate", name="data.train")
    assert (dataset.counts.truncated, dataset.counts.dropped, len(dataset)) == (1, 1, 2)
    first = Example(np.arange(9, dtype=np.int32), np.array([0] + [IGNORED] * 7 + [8], np.int32), "rows.jsonl:1")
    assert collect([first, example(4)], LIMIT, "truncate", name="data.train").counts.dropped == 1


def test_long_rows_are_left_out_and_counted():
    dataset = collect([example(LIMIT + 1), example(4), example(LIMIT)], LIMIT, "drop", name="data.train")
    assert dataset.lengths.tolist() == [4, LIMIT]
    assert (dataset.counts.rows, dataset.counts.dropped, dataset.counts.truncated) == (3, 1, 0)


def test_long_rows_are_refused_by_file_and_line():
    with pytest.raises(LlmtuneDataError, match=r"^rows.jsonl:7: 9 tokens, data.sequence_length is 8; raise it, or"):
        collect([example(LIMIT), example(LIMIT + 1, line=7)], LIMIT, "error", name="data.train")


@pytest.mark.parametrize("length", range(LIMIT, 4 * LIMIT + 2))
@pytest.mark.parametrize("too_long", ["truncate", "drop", "error"])
def test_text_is_split_and_no_token_is_lost(length, too_long):
    """But for a last one alone: the first of a piece is never a target, so it could teach nothing."""
    given = example(length, cut="pieces")
    dataset = collect([given], LIMIT, too_long, name="data.train")
    pieces = contents(dataset)
    alone = length % LIMIT == 1
    for whole, parts in zip((given.input_ids, given.labels), zip(*pieces, strict=True), strict=True):
        assert [token for part in parts for token in part] == whole[: length - alone].tolist()
    assert all(2 <= len(ids) <= LIMIT for ids, _ in pieces)
    assert dataset.counts.split == (length > LIMIT)
    assert dataset.counts.targets == length - alone - len(pieces)


@pytest.mark.parametrize("rows, said", [([], "there are no rows"), ([example(9)], "every row was left out")])
def test_nothing_to_train_on_is_said(rows, said):
    with pytest.raises(LlmtuneDataError, match=f"^data.train: nothing to train on: {said}"):
        collect(rows, LIMIT, "drop", name="data.train")


def chat(*turns, line=1):
    """Turns of (length, is it the assistant's); the ids count on from 100."""
    ids = np.arange(100, 100 + sum(length for length, _ in turns), dtype=np.int32)
    targets = np.repeat([own for _, own in turns], [length for length, _ in turns])
    return Example(ids, np.where(targets, ids, IGNORED).astype(np.int32), f"chats.jsonl:{line}", "turn")


@pytest.mark.parametrize(
    "turns, kept",
    [
        ([(2, False), (3, True), (2, False), (3, True)], 5),  # the second answer does not fit whole
        ([(2, False), (2, True), (2, False), (2, True), (1, False), (4, True)], 8),  # two do, to the last token
        ([(2, False), (2, True), (5, False), (1, True)], 4),
        ([(2, False), (9, True)], 8),  # the first one does not: it is cut
    ],
)
def test_a_long_conversation_is_cut_after_its_last_whole_answer(turns, kept):
    given = chat(*turns)
    dataset = collect([given], LIMIT, "truncate", name="data.train")
    assert contents(dataset) == [(given.input_ids[:kept].tolist(), given.labels[:kept].tolist())]
    assert (dataset.counts.truncated, dataset.counts.dropped) == (1, 0)


def test_a_conversation_without_room_for_an_answer_is_dropped():
    dataset = collect([chat((8, False), (3, True)), example(4)], LIMIT, "truncate", name="data.train")
    assert (dataset.counts.truncated, dataset.counts.dropped, len(dataset)) == (0, 1, 1)


def test_sources_are_joined_with_the_sums_of_their_counts():
    parts = [collect(rows, LIMIT, "truncate", name="x") for rows in ([example(3), example(12)], [example(5)])]
    mixture = Mixture((2, 1), (1.0, 2.0))
    whole = join(parts, mixture)
    assert contents(whole) == contents(parts[0]) + contents(parts[1]) and whole.mixture is mixture
    assert (whole.counts.rows, whole.counts.truncated, whole.counts.tokens) == (3, 1, 16)
