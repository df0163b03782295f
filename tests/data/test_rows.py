"""Files of rows: what is read, and that every mistake is named as file:line in one line."""

import json

import pytest

from llmtune.data.files import data_files, files_digest, read_identity
from llmtune.data.rows import read_rows
from llmtune.errors import LlmtuneDataError

ROWS = [{"text": "one"}, {"text": "zwei\n\U0001f642 \u2028"}, {"text": ""}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def values(*paths):
    return [row.value for row in read_rows(data_files([str(path) for path in paths]))]


def refusal(path):
    with pytest.raises(LlmtuneDataError) as caught:
        values(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    {
        "plain": b"\n".join(LINES) + b"\n",
        "no newline at the end": b"\n".join(LINES),
        "blank lines": b"\n\n" + b"\n  \n\t\n".join(LINES) + b"\n\n\n",
        "a byte order mark": BOM + b"\n".join(LINES),
        "lines ended as on Windows": b"\r\n".join(LINES) + b"\r\n",
        "all of them": BOM + b"\r\n" + b"\r\n\r\n".join(LINES),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_row_per_line_of_jsonl(write, content):
    assert values(write("rows.jsonl", content[1])) == ROWS


@pytest.mark.parametrize("start", [b"", BOM])
def test_a_list_of_rows_in_json(write, start):
    assert values(write("rows.json", start + json.dumps(ROWS, indent=1).encode())) == ROWS


@pytest.mark.parametrize("start", [b"", BOM])
def test_a_text_file_is_one_document(write, start):
    text = "First line\r\n\n  second \u2028 line\n"
    assert values(write("book.txt", start + text.encode())) == [{"text": text}]


def test_several_files_follow_each_other(write):
    first, second = write("b.jsonl", LINES[0]), write("a.JSON", json.dumps(ROWS[1:]).encode())
    assert values(first, second) == ROWS


def test_rows_know_their_lines(write):
    path = write("rows.jsonl", b"\n\n".join(LINES))
    assert [row.where for row in read_rows([path])] == [f"{path}:1", f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "caf\xe9"}', "not UTF-8 (there is a byte 0xe9)"),
        (b'{"text": "half of \xf0\x9f"}', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 (there is a byte 0xff)"),
        (b'{"text": "cut', "not valid JSON"),
        (b'{"text": 1', "not valid JSON"),
        (b"{'text': 'quoted wrongly'}", "not valid JSON"),
        (b'{"text": "one"} {"text": "two"}', "not valid JSON (Extra data"),
        (b'{"text": "a\x01b"}', "not valid JSON (Invalid control character"),
        pytest.param(b'{"input_ids": [%b]}' % (b"9" * 5000), "not valid JSON", id="a number of 5000 digits"),
        pytest.param(b"[" * 100_000, "nested too deep", id="deep"),
        (b"[1, 2]", "a row is an object of columns, not list"),
        (b'"text"', "a row is an object of columns, not str"),
        (b"null", "a row is an object of columns, not NoneType"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(write, line, said):
    path = write("rows.jsonl", b"\r\n".join([LINES[0], b"", line, LINES[1]]))
    assert refusal(path).startswith(f"{path}:3: {said}")


@pytest.mark.parametrize("name", ["rows.json", "book.txt"])
def test_bytes_that_are_not_utf8_are_named_by_line_in_every_kind_of_file(write, name):
    path = write(name, b'[{"text":\n"x"},\n{"text": "caf\xe9"}]')
    assert refusal(path).startswith(f"{path}:3: not UTF-8")


def test_a_mistake_in_a_json_file_is_named_by_line(write):
    path = write("rows.json", b'[{"text": "x"},\n{"text": "y"\n{"text": "z"}]')
    assert refusal(path).startswith(f"{path}:3: not valid JSON")
    path = write("rows.json", b'[{"text": "x"},\n"y"]')
    assert refusal(path).startswith(f"{path}: row 2: a row is an object")


def test_a_json_file_holds_a_list(write):
    assert "a list of rows is expected, not dict; one row per line goes into .jsonl" in refusal(
        write("a.json", LINES[0])
    )


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.zip", "rows.gz", "rows.tar.gz"])
def test_other_kinds_of_files_are_refused_by_name(write, name):
    path = write(name, LINES[0])
    assert refusal(path).startswith(f"{path}: ") and refusal(path).endswith(
        ".jsonl, .json, .csv, .txt, .parquet, each also with .gz, .bz2, .xz, .zst are"
    )


def test_an_empty_and_a_missing_file_are_refused(write, tmp_path):
    path = write("rows.jsonl", b"")
    assert refusal(path) == f"{path}: the file is empty"
    assert refusal(tmp_path / "other.jsonl").startswith(f"{tmp_path / 'other.jsonl'}: no such file")
    assert refusal(tmp_path) == f"{path}: the file is empty"


def test_a_file_that_cannot_be_read_is_one_line(write, monkeypatch):
    path = write("rows.jsonl", LINES[0])

    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)
    assert refusal(path) == f"{path}: cannot be read (Permission denied)"


def digest(*paths):
    return files_digest(read_identity(paths))


def test_the_digest_is_of_the_contents_in_their_order(write, tmp_path):
    one, two = write("1.jsonl", LINES[0]), write("2.jsonl", LINES[1])
    (tmp_path / "elsewhere").mkdir()
    copy = write("elsewhere/3.jsonl", LINES[0])
    assert digest(one) == digest(copy)
    assert len({digest(*paths) for paths in ([one], [two], [one, two], [two, one])}) == 4
