"""Streams: every token once a pass and in its share, the same batches from any position, whoever reads them."""

import json

import numpy as np
import pytest

from llmtune.data import stream as room
from llmtune.data.example import IGNORED, Example
from llmtune.data.stream import Position, Stream, StreamedSource


def read(rows):
    """A document of the numbers that a row lists."""
    for row in rows:
        ids = np.array(row.value["ids"], np.int32)
        yield Example(ids, ids.copy(), row.where)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two sources of three and one files; every token of the first is below 1000, every one of the second above."""
    monkeypatch.setattr(room, "BLOCK", 4)
    rng, number, found = np.random.default_rng(0), 1, {"a": [], "b": []}
    for name, count, base in (("a", 3, 0), ("b", 1, 1000)):
        for part in range(count):
            path, lines = tmp_path / f"{name}{part}.jsonl", []
            for _ in range(10 + part):
                length = int(rng.integers(1, 30))
                lines.append(json.dumps({"ids": [base + (number + k) % 1000 for k in range(length)]}))
                number += length
            path.write_text("\n".join(lines))
            found[name].append(path)
    return found


def make(files, key=(7,), weights=(1.0, 1.0), share=None):
    sources = tuple(
        StreamedSource(tuple(paths), read, weight, None if key is None else (*key, n))
        for n, (paths, weight) in enumerate(zip(files.values(), weights, strict=True))
    )
    return Stream(sources, 4, 16, share)


def take(stream, count, position=None):
    batches = stream.batches(position or stream.start())
    return [next(batches) for _ in range(count)]


def test_a_pass_gives_every_document_once_in_an_order_of_its_own(files):
    documents = make(files).sources[0].documents(room.Cursor())
    passes = [[], []]
    while len(passes) == 2 or passes[-1] == []:
        example, cursor = next(documents)
        if cursor.epoch == 2:
            break
        passes[cursor.epoch].append(tuple(example.input_ids.tolist()))
    lines = [tuple(json.loads(line)["ids"]) for path in files["a"] for line in path.read_text().splitlines()]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(lines)
    assert passes[0] != passes[1] and passes[0] != lines
    plain = make(files, key=None).sources[0].documents(room.Cursor())
    assert [tuple(next(plain)[0].input_ids.tolist()) for _ in lines] == lines


def test_rows_are_full_and_hold_the_documents_one_after_the_other(files):
    stream = make({"a": files["a"]}, key=None, weights=(1.0,))
    batches = [batch for batch, _ in take(stream, 5)]
    tokens = np.concatenate([batch["tokens"].reshape(-1) for batch in batches])
    lines = [json.loads(line)["ids"] for path in files["a"] for line in path.read_text().splitlines()]
    assert tokens.tolist() == [token for line in lines * 2 for token in line][: len(tokens)]
    for batch in batches:
        assert (batch["segment_ids"] > 0).all() and "source_ids" not in batch
        first = batch["positions"] == 0
        assert (batch["labels"][first] == IGNORED).all() and (batch["labels"][~first] == batch["tokens"][~first]).all()
        assert (np.diff(batch["segment_ids"], axis=1) == first[:, 1:]).all()


def test_from_any_position_the_same_batches_follow(files):
    stream = make(files)
    whole = take(stream, 40)
    assert any(position.current >= 0 for _, position in whole) and max(p.cursors[1].epoch for _, p in whole) > 0
    for start in (1, 2, 7, 19, 30):
        position = Position.from_json(json.loads(json.dumps(whole[start - 1][1].to_json())))
        for (batch, after), (expected, place) in zip(
            take(make(files), 5, position), whole[start : start + 5], strict=True
        ):
            assert after == place
            for name in expected:
                np.testing.assert_array_equal(batch[name], expected[name])


def test_sources_come_in_their_shares(files):
    batches = take(make(files, weights=(3.0, 1.0)), 30)
    ids = np.concatenate([batch["source_ids"].reshape(-1) for batch, _ in batches])
    tokens = np.concatenate([batch["tokens"].reshape(-1) for batch, _ in batches])
    assert ((tokens >= 1000) == (ids == 1)).all()
    assert abs((ids == 1).mean() - 0.25) < 30 / len(ids)  # a document at most
    assert batches[-1][1].drawn == ((ids == 0).sum(), (ids == 1).sum())


def test_processes_share_each_batch_whatever_their_number(files):
    whole = take(make(files), 6)
    for count in (2, 4):
        shares = [take(make(files, share=tuple(range(4))[index::count]), 6) for index in range(count)]
        for step in range(6):
            for index, own in enumerate(shares):
                np.testing.assert_array_equal(own[step][0]["tokens"], whole[step][0]["tokens"][index::count])
            assert {share[step][1] for share in shares} == {whole[step][1]}
