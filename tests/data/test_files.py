"""Which files a configuration means, and that compressed ones give the same rows, and never more than there is room for."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmtune.data import files as files_module
from llmtune.data.files import data_files
from llmtune.data.rows import MAX_ROW, read_rows
from llmtune.errors import LlmtuneDataError

ROWS = [{"text": f"row {number} \U0001f642\n\u2028"} for number in range(300)]
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def values(*names):
    return [row.value for row in read_rows(data_files([str(name) for name in names]))]


def refusal(path):
    with pytest.raises(LlmtuneDataError) as caught:
        values(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_compressed_files_give_the_rows_of_plain_ones(write, packing, kind):
    content = {".jsonl": jsonl, ".csv": as_csv}.get(kind, lambda rows: json.dumps(rows, indent=1).encode())(ROWS)
    plain, packed = write(f"rows{kind}", content), write(f"packed{kind}{packing}", PACK[packing](content))
    assert values(packed) == values(plain)
    assert kind == ".txt" or values(packed) == ROWS


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_archives_of_several_streams_are_read_to_the_end(write, packing):
    content = b"".join(PACK[packing](jsonl(part)) for part in (ROWS[:7], ROWS[7:200], ROWS[200:]))
    assert values(write(f"rows.jsonl{packing}", content)) == ROWS


@pytest.mark.parametrize("packing", PACK)
def test_a_damaged_archive_is_one_line(write, packing):
    whole = PACK[packing](jsonl(ROWS))
    for content in (b"no archive at all", whole[: len(whole) // 2]):
        path = write(f"rows.jsonl{packing}", content)
        assert refusal(path).startswith(f"{path}: damaged, or not a {packing} file")


@pytest.mark.parametrize("packing", PACK)
def test_a_bomb_is_refused_after_a_bounded_number_of_bytes(write, packing, monkeypatch):
    monkeypatch.setattr(files_module, "ALLOWANCE", 1 << 20)
    path = write(f"rows.jsonl{packing}", PACK[packing](b'{"text": "' + b"a" * (32 << 20) + b'"}\n'))
    assert "expands to more than 200 times its size" in refusal(path)


def test_parquet_gives_the_rows_of_its_table(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"number {n}"}], "score": n / 2} for n in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=300)
    assert values(tmp_path / "rows.parquet") == rows
    named = [row.where for row in read_rows([tmp_path / "rows.parquet"])]
    assert named[999] == f"{tmp_path / 'rows.parquet'}: row 1000"


def test_a_parquet_file_that_is_none_is_one_line(write):
    path = write("rows.parquet", jsonl(ROWS))
    assert refusal(path).startswith(f"{path}: damaged, or not a parquet file")


@pytest.mark.parametrize("name, module", [("rows.parquet", "pyarrow.parquet"), ("rows.jsonl.zst", "zstandard")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(write, monkeypatch, name, module):
    path = write(name, b"x")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert refusal(path) == f"{path}: {path.suffix} files need {module.split('.')[0]}; pip install 'llmtune[data]'"


def test_csv_has_its_columns_in_the_first_line(write, assets):
    path = write("rows.csv", b'\xef\xbb\xbfprompt,completion\r\n"two\nlines, one ""word""",x\r\n\r\na,\r\n')
    rows = list(read_rows([path]))
    assert [row.value for row in rows] == [
        {"prompt": 'two\nlines, one "word"', "completion": "x"}, {"prompt": "a", "completion": ""}
    ]  # fmt: skip
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:5"]
    real = values(assets / "data" / "TruthfulQA.csv")
    assert len(real) == 817 and {len(row) for row in real} == {7} and real[0]["Type"] == "Adversarial"


def test_directories_and_patterns_name_all_their_files_in_order(write, tmp_path):
    for name in ("b.jsonl", "a/2.jsonl.gz", "a/1.json", "c.csv"):
        kind = {".json": lambda rows: json.dumps(rows).encode(), ".csv": as_csv}.get(name[name.rfind(".") :], jsonl)
        content = kind([{"text": name}])
        write(name, gzip.compress(content) if name.endswith(".gz") else content)
    for name in ("README.md", ".hidden/x.jsonl", "_SUCCESS", "a/.x.jsonl"):
        write(name, b"no row")
    assert [row["text"] for row in values(tmp_path)] == ["a/1.json", "a/2.jsonl.gz", "b.jsonl", "c.csv"]
    assert [row["text"] for row in values(f"{tmp_path}/*/*.js*")] == ["a/1.json", "a/2.jsonl.gz"]
    assert [row["text"] for row in values(f"{tmp_path}/**/*.jsonl*", tmp_path / "c.csv")] == [
        "a/2.jsonl.gz", "b.jsonl", "c.csv"
    ]  # fmt: skip


def test_a_directory_and_a_pattern_without_data_say_so(write, tmp_path):
    write("README.md", b"x")
    assert refusal(tmp_path).startswith(f"{tmp_path}: no data file lies in this directory")
    assert refusal(f"{tmp_path}/*.jsonl") == f"{tmp_path}/*.jsonl: no file matches this pattern"
    assert refusal(tmp_path / "[x].jsonl").endswith("no file matches this pattern")


def test_a_file_whose_name_has_brackets_is_that_file(write):
    assert values(write("rows[1].jsonl", jsonl(ROWS))) == ROWS


def test_long_json_lists_are_read_piece_by_piece(write):
    rows = [{"text": '\u00e9\\"[{' * (number % 40), "number": number} for number in range(40_000)]
    content = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    assert len(content) > 3 << 20
    assert values(write("rows.json", content)) == rows
    assert values(write("empty.json", b" [ \n] ")) == []


@pytest.mark.parametrize(
    "content, said",
    [
        (b'[{"a": 1},]', ":1: not valid JSON"),
        (b'[{"a": 1}\n{"a": 2}]', ":2: not valid JSON (a comma or the end of the list is expected)"),
        (b'[{"a": 1}', ":1: not valid JSON (a comma or the end of the list is expected)"),
        (b'[{"a": 1}]\n[]', ":2: not valid JSON (something follows the list)"),
        (b'[\n{"a": 1, "a": 2}]', ": row 1: the key 'a' stands twice"),
        (b'[{"a": NaN}]', ": row 1: not valid JSON (NaN is no JSON value"),
        (b"[" * 100_000, ": row 1: nested too deep"),
        (b'[{"a": "' + b"x" * (2 * MAX_ROW) + b'"}]', ": row 1: the row is larger than 2 MiB"),
        (b'[{"a": [' + b"1, " * (2 * MAX_ROW // 3) + b"1]}]", ": row 1: the row is larger than 2 MiB"),
    ],
    ids=range(9),
)
def test_mistakes_in_a_json_list_are_named(write, content, said):
    path = write("rows.json", content)
    assert refusal(path).startswith(f"{path}{said}")


def test_a_long_text_comes_in_pieces_that_begin_lines(write):
    text = "".join(f"line {number} of \u00e9\n" for number in range(200_000))
    rows = list(read_rows([write("book.txt", text.encode())]))
    assert len(rows) > 2 and "".join(row.value["text"] for row in rows) == text
    assert all(row.value["text"].startswith("line ") for row in rows)
    assert rows[1].where.endswith(f"book.txt:{rows[0].value['text'].count(chr(10)) + 1}")
