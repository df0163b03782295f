"""Rows that poison a run: each is named by file and line, or left out and counted, quickly and in little memory."""

import subprocess
import sys
from dataclasses import replace

import pytest

from llmtune import pretrained
from llmtune.config.file import build_run
from llmtune.data import load_data
from llmtune.errors import LlmtuneDataError
from tests.conftest import ROOT

GOOD = b'{"prompt": "Name an animal:", "completion": " a fox"}'
POISON = {
    "bad UTF-8": (b'{"prompt": "caf\xe9", "completion": "x"}', "not UTF-8 (there is a byte 0xe9)", "not UTF-8"),
    "UTF-16": ('{"prompt": "x", "completion": "y"}'.encode("utf-16-be"), "not valid JSON", "not JSON"),
    "a mark in the middle": (b"\xef\xbb\xbf" + GOOD, "not valid JSON", "not JSON"),
    "lone surrogate": (b'{"prompt": "\\ud83d", "completion": "x"}', "the text holds a lone surrogate", "lone surrogate"),
    "NUL": (b'{"prompt": "a\\u0000b", "completion": "x"}', "the text holds a NUL (at character 1)", "NUL in the text"),
    "raw NUL": (b'{"prompt": "a\0b", "completion": "x"}', "not valid JSON", "not JSON"),
    "large": (b'{"prompt": "' + b"x" * (5 << 20) + b'", "completion": "x"}', "the row is larger than 2 MiB", "too large"),
    "null": (b'{"prompt": null, "completion": "x"}', "the column 'prompt' is NoneType", "wrong type"),
    "null row": (b"null", "a row is an object of columns, not NoneType", "not an object"),
    "list": (b'["prompt", "completion"]', "a row is an object of columns, not list", "not an object"),
    "number": (b'{"prompt": 5, "completion": "x"}', "the column 'prompt' is int, a text is expected", "wrong type"),
    "object": (b'{"prompt": {"a": 1}, "completion": "x"}', "the column 'prompt' is dict", "wrong type"),
    "missing": (b'{"prompt": "x"}', "the column 'completion' is missing", "a column is missing"),
    "duplicate": (b'{"prompt": "x", "prompt": "y", "completion": "x"}', "the key 'prompt' stands twice", "a key stands twice"),
    "deep": (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deep to be a row", "not JSON"),
    "NaN": (b'{"prompt": "x", "completion": NaN}', "not valid JSON (NaN is no JSON value", "not JSON"),
    "Infinity": (b'{"prompt": "x", "completion": "y", "w": -Infinity}', "not valid JSON (-Infinity is no", "not JSON"),
    "cut": (b'{"prompt": "x", "comple', "not valid JSON", "not JSON"),
    "no target": (b'{"prompt": "x", "completion": ""}', "the row has no target token", "no target"),
}  # fmt: skip


@pytest.fixture
def load(tmp_path, starter):
    source = pretrained.open_source(str(starter))

    def load(content, name="rows.jsonl", **data):
        path = tmp_path / name
        path.write_bytes(content)
        tree = {"model": "m", "output": "o", "data": {"train": str(path), "sequence_length": 64, **data}}
        return load_data(build_run(tree, "run.yaml"), source.config, starter)

    return load


@pytest.mark.parametrize("name", POISON)
def test_the_policy_error_names_file_and_line(load, tmp_path, name):
    row, said, _ = POISON[name]
    with pytest.raises(LlmtuneDataError) as caught:
        load(b"\n".join([GOOD, GOOD, row, GOOD]))
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:3: {said}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", POISON)
def test_the_policy_skip_counts_by_reason_and_keeps_the_others(load, tmp_path, name):
    row, said, reason = POISON[name]
    data = load(b"\n".join([GOOD, row, GOOD, row, *[GOOD] * 8]), invalid="skip", max_skipped=0.5)
    (report,) = data.sources
    assert report.skipped == {reason: 2} and report.counts.rows - 2 == report.counts.examples == 10
    assert [place.split(": ")[0] for place in report.skipped_first] == [
        f"{tmp_path / 'rows.jsonl'}:{n}" for n in (2, 4)
    ]
    assert said in report.skipped_first[0] and f"2 skipped (2 {reason})" in data.notes[0]


def test_more_bad_rows_than_allowed_are_an_error(load, tmp_path):
    row = POISON["null"][0]
    assert load(b"\n".join([row, *[GOOD] * 99]), invalid="skip").train.counts.rows == 100
    with pytest.raises(LlmtuneDataError) as caught:
        load(b"\n".join([row, *[GOOD] * 98]), invalid="skip")
    assert str(caught.value).startswith(
        "data.train: 1 skipped (1 wrong type) of 99 rows, more than data.max_skipped 0.01"
    )
    assert f"{tmp_path / 'rows.jsonl'}:1: the column 'prompt' is NoneType" in str(caught.value)


def test_when_every_row_is_bad_that_is_said_with_the_reasons(load):
    with pytest.raises(LlmtuneDataError, match=r"there are no rows .*; 3 skipped \(3 wrong type\)"):
        load(b"\n".join([POISON["null"][0]] * 3), invalid="skip", format="prompt_completion")


def test_a_byte_order_mark_at_the_beginning_is_no_mistake(load):
    assert load(b"\xef\xbb\xbf" + GOOD).train.counts.rows == 1


def test_rows_of_csv_that_do_not_fit_the_header_are_bad_rows(load, tmp_path):
    content = b"prompt,completion\r\na,b\r\na,b,c\r\ncaf\xe9,b\r\n" + b"x" * (5 << 20) + b",y\r\na,b\r\n"
    data = load(content, "rows.csv", invalid="skip", max_skipped=0.9)
    assert data.sources[0].skipped == {"wrong number of fields": 1, "not UTF-8": 1, "too large": 1}
    assert (
        data.sources[0]
        .skipped_first[0]
        .startswith(f"{tmp_path / 'rows.csv'}:3: 3 fields, where the first line names 2")
    )
    assert (data.train.counts.rows, data.train.counts.examples) == (5, 2)


MEASURE = """
import resource, sys, time
from llmtune import pretrained
from llmtune.config.file import build_run
from llmtune.data import load_data
starter, first, *others = sys.argv[1:]
source = pretrained.open_source(starter)
data = {"sequence_length": 64, "invalid": "skip", "max_skipped": 1.0, "format": "prompt_completion"}
for path in (first, *others):
    run = build_run({"model": "m", "output": "o", "data": {**data, "train": path}}, "run.yaml")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = load_data(run, source.config, source.directory)
    seconds, kilobytes = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(found.train.counts.rows, seconds, kilobytes / 1024, *found.sources[0].skipped)
"""


def test_one_row_takes_at_most_two_seconds_and_256_megabytes(tmp_path, starter):
    texts = {"line": b"x" * 100_000_000, "text": b"Mira the fox met Otto. " * 87_000, "word": b"Mira" * 500_000}
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"prompt": "x", "completion": "' + text + b'"}\n' + GOOD)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("good", *texts)]
    command = [sys.executable, "-c", MEASURE, str(starter), *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    _, *figures = (line.split(maxsplit=3) for line in done.stdout.splitlines())
    assert [(own[0], own[3:]) for own in figures] == [("2", ["too large"]), ("2", []), ("2", [])]
    assert all(float(seconds) < 2 and float(megabytes) < 256 for _, seconds, megabytes, *_ in figures), figures


def test_a_bad_token_id_is_skipped_too(load):
    rows = [b'{"input_ids": [1, 2, 3]}', b'{"input_ids": [1, 99999]}', b'{"input_ids": [1, 2], "labels": [1]}']
    data = load(b"\n".join(rows), invalid="skip", max_skipped=0.9)
    assert data.sources[0].skipped == {"ids outside the vocabulary": 1, "labels of another length": 1}
    assert replace(data.sources[0].counts) == data.train.counts
