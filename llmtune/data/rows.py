"""Files of rows -> Python objects, each with the place it came from.

Every mistake is named as file:line. All files are streamed: at no time more than one row, or one batch of a parquet file, is
held, and a row of more than MAX_ROW bytes is refused without being parsed. A txt file is one document; one longer than a
piece comes as several rows, cut before a line.
"""

import codecs
import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmtune.data.files import kind_of, open_bytes, optional
from llmtune.data.invalid import BadRow, Refuse, stop
from llmtune.data.spans import Line, Span, Where, enter
from llmtune.errors import LlmtuneDataError

BOM = b"\xef\xbb\xbf"
MAX_ROW = 2 << 20
PIECE = 1 << 20
LARGE = f"the row is larger than {MAX_ROW >> 20} MiB; split it (text of any length may stand in a .txt file)"


@dataclass(frozen=True, slots=True)
class Row:
    """`where` is file:line, for messages."""

    value: dict[str, Any]
    where: Where


def read_rows(files: Sequence[Path | Span], refuse: Refuse = stop) -> Iterator[Row]:
    """All rows of all files, in order. `refuse` hears of each bad row; where it returns, reading goes on after it."""
    for span in (Span(file) if isinstance(file, Path) else file for file in files):
        try:
            yield from READERS[kind_of(span.path)](span, refuse)
        except OSError as error:
            raise LlmtuneDataError(f"{span.path}: cannot be read ({error.strerror or error})") from None


def _jsonl(span: Span, refuse: Refuse) -> Iterator[Row]:
    with open_bytes(span.path) as file:
        enter(file, span)
        for number, line in _lines(file, span, refuse):
            where = _line(span, number)
            try:
                first = number == 1 and not span.begin
                text = _decode(line.removeprefix(BOM) if first else line, span, number).strip()
                if text:
                    yield _row(_parse(text, where), where)
            except BadRow as error:
                refuse(error)


def _line(span: Span, number: int) -> Where:
    return f"{span.path}:{number}" if span.begin == 0 else Line(span, number)


def _lines(file: BinaryIO, span: Span, refuse: Refuse) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a span that was entered, counted from 1."""
    number = 0
    while (span.end is None or file.tell() < span.end) and (line := file.readline(MAX_ROW + 1)):
        number += 1
        if len(line) > MAX_ROW:
            while line and not line.endswith(b"\n"):
                line = file.readline(PIECE)
            refuse(BadRow(_line(span, number), LARGE, "too large"))
        else:
            yield number, line


def _json(span: Span, refuse: Refuse) -> Iterator[Row]:
    """The objects of a list, one after the other: a list of any length is never held as a whole."""
    path = span.path
    with open_bytes(path) as file:
        text = _Text(path, file)
        start = text.skip_space()
        if start != "[":
            kind = {"{": "dict", '"': "str", "": "nothing"}.get(start, "a value")
            said = f"a list of rows is expected, not {kind}; one row per line goes into .jsonl"
            raise LlmtuneDataError(f"{path}: {said}")
        text.at += 1
        number, ahead = 0, text.skip_space()
        text.at += ahead == "]"
        while ahead != "]":
            number += 1
            where = f"{path}: row {number}"
            try:
                yield _row(text.value(where), where)
            except BadRow as error:
                refuse(error)
            ahead = text.skip_space()
            if ahead not in (",", "]"):
                raise LlmtuneDataError(f"{text.where()}: not valid JSON (a comma or the end of the list is expected)")
            text.at += 1
        if text.skip_space():
            raise LlmtuneDataError(f"{text.where()}: not valid JSON (something follows the list)")


class _Text:
    """A window on a long text: `buffer[at]` is the next character."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def where(self) -> str:
        return f"{self.path}:{self.line + self.buffer.count(chr(10), 0, self.at)}"

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        raw = self.file.read(PIECE)
        self.ended = not raw
        self.line += self.buffer.count("\n", 0, self.at)
        try:
            self.buffer = self.buffer[self.at :] + self.decoder.decode(raw, self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.buffer.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            raise LlmtuneDataError(str(_not_utf8(error.object[error.start], Span(self.path), line))) from None
        self.at = 0
        return True

    def skip_space(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def value(self, where: str) -> Any:
        """The next JSON value. A syntax error ends the file: nobody can say where the next row begins."""
        self.skip_space()
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.at <= MAX_ROW and self.more():
                    continue
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 8
                if cut and not self.ended:
                    raise LlmtuneDataError(f"{where}: {LARGE}") from None
                self.at = error.pos
                raise LlmtuneDataError(f"{self.where()}: not valid JSON ({error.msg})") from None
            except _Repeated as error:
                raise LlmtuneDataError(f"{where}: {error}") from None
            except (RecursionError, ValueError) as error:
                raise LlmtuneDataError(f"{where}: {_said(error)}") from None
            if end < len(self.buffer) or not self.more():  # a number may go on in what was not read yet
                if end - self.at > MAX_ROW:
                    self.at = end
                    raise BadRow(where, LARGE, "too large")
                self.at = end
                return value


def _csv(span: Span, refuse: Refuse) -> Iterator[Row]:
    """The first line names the columns; all values are texts. Bytes that are not UTF-8 become lone surrogates for a moment."""
    path = span.path
    csv.field_size_limit(MAX_ROW)
    with open_bytes(path) as file:
        lines = _lines(file, span, refuse)
        texts = ((line.removeprefix(BOM) if n == 1 else line).decode("utf-8", "surrogateescape") for n, line in lines)
        reader = csv.reader(texts)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise LlmtuneDataError(f"{path}:1: a column stands twice in {header}; rename one of them")
        while True:
            line = reader.line_num + 1
            where = f"{path}:{line}"
            try:
                values = next(reader)
                broken = next((c for value in values for c in value if "\udc80" <= c <= "\udcff"), None)
                if broken is not None:
                    raise _not_utf8(ord(broken) - 0xDC00, span, line)
                if values and len(values) != len(header):
                    said = f"{len(values)} fields, where the first line names {len(header)} columns"
                    raise BadRow(where, said, "wrong number of fields")
                if values:
                    yield Row(dict(zip(header, values, strict=True)), where)
            except StopIteration:
                return
            except csv.Error as error:
                refuse(BadRow(where, f"not valid CSV ({error})", "not CSV"))
            except BadRow as error:
                refuse(error)


def _txt(span: Span, refuse: Refuse) -> Iterator[Row]:
    path = span.path
    with open_bytes(path) as file:
        held, line = file.read(PIECE).removeprefix(BOM), 1
        while held:
            more = file.read(PIECE)
            end = held.rfind(b"\n", 0, -1) + 1 if more else len(held)
            if not end and len(held) > MAX_ROW:
                raise LlmtuneDataError(f"{path}:{line}: a line of more than {MAX_ROW >> 20} MiB; break it")
            if end:
                text = _decode(held[:end], span, line)
                yield Row({"text": text}, str(path) if line == 1 and not more else f"{path}:{line}")
            line += held.count(b"\n", 0, end)
            held = held[end:] + more


def _parquet(span: Span, refuse: Refuse) -> Iterator[Row]:
    path = span.path
    parquet = optional("pyarrow.parquet", path)
    if path.suffix.lower() != ".parquet":
        raise LlmtuneDataError(f"{path}: parquet files are compressed inside; unpack this one")
    try:
        with parquet.ParquetFile(path) as file:
            number, groups = _row_groups(file.metadata, span)
            for batch in file.iter_batches(batch_size=64, row_groups=groups):
                rows = [batch] if batch.nbytes <= MAX_ROW else [batch.slice(k, 1) for k in range(batch.num_rows)]
                for part in rows:
                    if part.num_rows == 1 and part.nbytes > MAX_ROW:
                        number += 1
                        refuse(BadRow(f"{path}: row {number}", LARGE, "too large"))
                        continue
                    for value in part.to_pylist():
                        number += 1
                        yield Row(value, f"{path}: row {number}")
    except optional("pyarrow", path).ArrowException as error:
        said = " ".join(str(error).split())[:150]
        raise LlmtuneDataError(f"{path}: damaged, or not a parquet file ({said})") from None


def _row_groups(metadata: Any, span: Span) -> tuple[int, list[int]]:
    """(rows before them, row groups) of a span: a group begins where its share of the file's rows says."""
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    firsts = list(itertools.accumulate(counts, initial=0))
    size = span.path.stat().st_size
    own = [group for group, first in enumerate(firsts[:-1]) if span.has(size * first // max(firsts[-1], 1))]
    return firsts[own[0]] if own else 0, own


READERS: dict[str, Callable[[Span, Refuse], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _txt,
    ".parquet": _parquet,
}


class _Repeated(ValueError):
    """A key that stands twice: which of the two was meant, nobody can say."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Repeated(f"the key {twice!r} stands twice; remove one of them")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value; write null, or leave the key out")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _parse(text: str, where: Where) -> Any:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRow(where, f"not valid JSON ({error.msg} at column {error.colno})", "not JSON") from None
    except _Repeated as error:
        raise BadRow(where, str(error), "a key stands twice") from None
    except (RecursionError, ValueError) as error:
        raise BadRow(where, _said(error), "not JSON") from None


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep to be a row"
    return f"not valid JSON ({error})"  # NaN, or an integer of thousands of digits


def _decode(raw: bytes, span: Span, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(raw[error.start], span, line + raw.count(b"\n", 0, error.start)) from None


def _not_utf8(byte: int, span: Span, line: int) -> BadRow:
    return BadRow(_line(span, line), f"not UTF-8 (there is a byte 0x{byte:02x}); convert the file", "not UTF-8")


def _row(value: Any, where: Where) -> Row:
    if not isinstance(value, dict):
        said = f"a row is an object of columns, not {type(value).__name__}"
        raise BadRow(where, said, "not an object")
    return Row(value, where)
