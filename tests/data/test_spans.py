"""Files divided among processes: every row is in one share, in order, and says the same place."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtune.data.invalid import Skipped
from llmtune.data.rows import MAX_ROW, read_rows
from llmtune.data.spans import Span, share_of

COUNTS = (1, 2, 3, 7, 16, 61)


def told(rows):
    return [(json.dumps(row.value, sort_keys=True), str(row.where)) for row in rows]


def shares(paths, count):
    sizes = [path.stat().st_size for path in paths]
    return [list(share_of(paths, sizes, index, count)) for index in range(count)]


def require_same(paths, counts=COUNTS):
    """What all shares read, and what they leave out, is what one process reads and leaves out."""
    skipped = Skipped()
    whole = told(read_rows(paths, skipped))
    for count in counts:
        own = [Skipped() for _ in range(count)]
        read = [told(read_rows(spans, skip)) for spans, skip in zip(shares(paths, count), own, strict=True)]
        assert [row for part in read for row in part] == whole, count
        assert sum((skip.reasons for skip in own), start=type(skipped.reasons)()) == skipped.reasons
        assert [first for skip in own for first in skip.first][:3] == skipped.first
    return whole


def write_lines(path, seed, count=200, end=b"\n"):
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        kind = draw.random()
        text = "é\u2028ß" * draw.randrange(40) if kind < 0.5 else "x" * draw.randrange(3)
        row = json.dumps({"text": f"{number} {text}"}, ensure_ascii=kind < 0.3).encode()
        lines.append(b"" if kind > 0.95 else b"{broken" if kind > 0.9 else b'{"text": "\xff"}' if kind > 0.87 else row)
    path.write_bytes(b"\n".join(lines) + end)
    return path


@pytest.mark.parametrize("seed", range(8))
def test_json_lines_are_divided_at_lines(tmp_path, seed):
    paths = [write_lines(tmp_path / f"{k}.jsonl", 10 * seed + k, end=b"\n" if seed % 2 else b"") for k in range(3)]
    assert len(require_same(paths)) > 400


def test_every_cut_of_a_small_file(tmp_path):
    """Cuts before, in and after line ends, carriage returns, a byte order mark and blank lines."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n\n{"a": 2}\n{"a": 3}')
    for cut in range(1, path.stat().st_size):
        parts = [told(read_rows([Span(path, 0, cut)])), told(read_rows([Span(path, cut)]))]
        assert parts[0] + parts[1] == [(json.dumps({"a": k + 1}), f"{path}:{line}") for k, line in enumerate((1, 4, 5))]


def test_a_line_longer_than_a_share_is_of_who_has_its_beginning(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * (MAX_ROW + 5) + b'"}\n{"a": 3}\n')
    assert len(require_same([path], (2, 3, 9))) == 2
    assert sum(len(told(read_rows(spans, Skipped()))) > 0 for spans in shares([path], 9)) == 2


def test_parquet_is_divided_at_row_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"n": list(range(1000)), "text": ["x" * (n % 50) for n in range(1000)]}), path, row_group_size=90
    )
    assert len(require_same([path])) == 1000
    assert sum(bool(told(read_rows(spans))) for spans in shares([path], 4)) == 4


def test_other_files_are_read_whole_by_one(tmp_path):
    (tmp_path / "a.csv").write_text('text\none\n"two\nlines"\n')
    (tmp_path / "b.json").write_text('[{"text": "three"}, {"text": "four"}]')
    (tmp_path / "c.txt").write_text("five\nsix\n" * 50)
    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as file:
        file.write(b'{"text": "seven"}\n{"text": "eight"}\n')
    paths = sorted(tmp_path.iterdir())
    assert len(require_same(paths)) == 7
    for count in COUNTS:
        owned = [span for spans in shares(paths, count) for span in spans]
        assert owned == [Span(path) for path in paths]


def test_a_share_reads_its_part_of_the_bytes_alone(tmp_path, monkeypatch):
    """Nine tenths of a file of ten shares are never read by a process, unless it must name a line."""
    from llmtune.data import rows

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "%s"}\n' % (b"x" * 80) * 50_000)
    read = []

    def counting(opened):
        file = path.open("rb")
        readline = file.readline

        class Counted:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def readline(self, size):
                line = readline(size)
                read.append(len(line))
                return line

        return Counted()

    monkeypatch.setattr(rows, "open_bytes", counting)
    for spans in shares([path], 10):
        read.clear()
        assert sum(1 for _ in read_rows(spans)) == 5_000
        assert sum(read) <= path.stat().st_size / 10 + 200
