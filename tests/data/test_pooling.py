"""Several processes that read a source together know what one that reads it alone knows."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from llmtune import pretrained
from llmtune.config.file import build_run
from llmtune.data import load_data
from llmtune.errors import LlmtuneDataError


class Peer:
    """One of several threads that stand for processes; what they gather goes through one list."""

    def __init__(self, index, count, barrier, table):
        self.index, self.count, self.barrier, self.table = index, count, barrier, table

    def gather(self, own):
        self.table[self.index] = own.copy()
        self.barrier.wait(60)
        gathered = [self.table[index] for index in range(self.count)]
        self.barrier.wait(60)
        return gathered


def together(count, load):
    """What `load(peers, tick)` gives or raises in each of `count` processes, and how many rows each has read."""
    barrier, table, found, rows = threading.Barrier(count), {}, [None] * count, [0] * count

    def work(index):
        def tick(by):
            rows[index] += by

        try:
            found[index] = load(Peer(index, count, barrier, table), tick)
        except LlmtuneDataError as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,), name=str(index)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, rows


@pytest.fixture
def loader(stories):
    def loader(train, **options):
        source = pretrained.open_source(str(stories))
        data = {"train": train, "sequence_length": 256, "chat_template": "mistral-v1", **options}
        run = build_run({"model": "m", "output": "o", "data": data}, "run.yaml")
        return lambda peers=None, tick=lambda by: None: load_data(run, source.config, stories, tick, peers)

    return loader


def require_equal(one, other):
    for name in ("train", "validation"):
        first, second = getattr(one, name), getattr(other, name)
        for array in ("input_ids", "labels", "offsets"):
            np.testing.assert_array_equal(getattr(first, array), getattr(second, array))
            assert getattr(first, array).dtype == getattr(second, array).dtype
        assert (first.counts, first.mixture, first.sizes) == (second.counts, second.mixture, second.sizes)
    assert (one.digest, one.notes, one.sources, one.look) == (other.digest, other.notes, other.sources, other.look)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_know_what_one_alone_knows(loader, assets, count):
    """A mixture of a file that is divided, one that is not, long rows that are cut, and rows that are skipped."""
    data = assets / "data"
    load = loader(
        [
            {"path": str(data / "gsm8k_test.jsonl"), "columns": {"prompt": "question", "completion": "answer"}, "weight": 2},
            {"path": str(data / "lf_identity.json")},
            {"path": str(data / "lf_c4_demo.jsonl")},
        ],
        validation=str(data / "lf_alpaca_en_demo.json"),
    )  # fmt: skip
    alone, (found, rows) = load(), together(count, load)
    for own in found:
        require_equal(own, alone)
    assert sum(rows) == 1319 + 91 + 300 + 999
    assert max(rows) < 0.8 * sum(rows) and min(rows) > 0


def poisoned(path, bad):
    rows = [json.dumps({"prompt": f"How much is {k} and {k}?", "completion": str(2 * k)}) for k in range(300)]
    for place in bad:
        rows[place] = '{"prompt": "x", "completion": 3}'
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_what_was_skipped_is_counted_by_all(loader, tmp_path):
    load = loader(poisoned(tmp_path / "rows.jsonl", [5, 100, 290, 291]), invalid="skip", max_skipped=0.1)
    alone, (found, _) = load(), together(4, load)
    (report,) = alone.sources
    assert report.skipped == {"wrong type": 4} and report.counts.rows == 300
    assert all(dataclasses.replace(own.sources[0]) == report and own.notes == alone.notes for own in found)


@pytest.mark.parametrize("bad", [[290], [100, 290], [0]])
def test_the_first_bad_row_ends_all_processes_with_its_line(loader, tmp_path, bad):
    load = loader(poisoned(tmp_path / "rows.jsonl", bad))
    with pytest.raises(LlmtuneDataError) as one:
        load()
    found, _ = together(4, load)
    assert f"rows.jsonl:{bad[0] + 1}: " in str(one.value)
    assert [str(own) for own in found] == [str(one.value)] * 4


def test_too_many_skipped_and_nothing_left_are_told_alike(loader, tmp_path):
    several = loader(poisoned(tmp_path / "some.jsonl", range(200, 300)), invalid="skip")
    none = loader(poisoned(tmp_path / "none.jsonl", range(300)), invalid="skip")
    for load, said in ((several, "more than data.max_skipped"), (none, "nothing to train on")):
        with pytest.raises(LlmtuneDataError, match=said) as one:
            load()
        assert [str(own) for own in together(3, load)[0]] == [str(one.value)] * 3


def test_whole_files_fall_to_each_process_in_turn(loader, tmp_path):
    """Six sources of one file each that cannot be divided, four processes: none reads more than two of them."""
    rows = json.dumps([{"text": "Once upon a time there was a fox."}] * 50)
    paths = [tmp_path / f"{k}.json" for k in range(6)]
    for path in paths:
        path.write_text(rows)
    load = loader([{"path": str(path)} for path in paths])
    alone, (found, read) = load(), together(4, load)
    assert read == [100, 100, 50, 50]
    for own in found:
        np.testing.assert_array_equal(own.train.input_ids, alone.train.input_ids)
        assert (own.digest, own.notes, own.sources) == (alone.digest, alone.notes, alone.sources)


def test_processes_that_see_other_files_are_told(loader, tmp_path, monkeypatch):
    """One with a shorter copy, one with a file less, one that cannot read it: all end with the same line."""
    from llmtune.data import sources

    (tmp_path / "rows").mkdir()
    names = [tmp_path / "rows" / name for name in ("a.jsonl", "b.jsonl")]
    for name in names:
        name.write_text('{"text": "Once upon a time."}\n' * 20)
    short = tmp_path / "short" / "b.jsonl"
    short.parent.mkdir()
    short.write_text('{"text": "Once upon a time."}\n' * 15)
    load, asked = loader(str(tmp_path / "rows")), sources.data_files
    for seen, said in (
        ([names[0], short], "process 1 sees b.jsonl with 450 bytes where another sees b.jsonl with 600"),
        (names[:1], "process 1 sees 1 files where another sees 2"),
        ([names[0], tmp_path / "gone.jsonl"], "gone.jsonl: No such file or directory"),
    ):

        def listed(path, seen=seen):
            return seen if threading.current_thread().name == "1" else asked(path)

        monkeypatch.setattr(sources, "data_files", listed)
        found, _ = together(3, load)
        assert all(isinstance(own, LlmtuneDataError) and said in str(own) for own in found), found
        assert len({str(own) for own in found}) == 1


def test_more_processes_than_rows(loader, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Once upon a time."}\n{"text": "The end of it."}\n')
    load = loader(str(path))
    alone, (found, rows) = load(), together(8, load)
    assert sorted(rows) == [0] * 6 + [1, 1]
    for own in found:
        np.testing.assert_array_equal(own.train.input_ids, alone.train.input_ids)
