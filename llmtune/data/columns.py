"""Columns of a row by name, by path, or by the name that the user's file has for them.

columns: {prompt: question, completion: answer}      other names
columns: {output: instances.0.output}                a path into objects and lists
"""

from collections.abc import Mapping
from typing import Any

from llmtune.data.invalid import BadRow
from llmtune.data.rows import Row
from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers.protocol import require_characters

Columns = Mapping[str, str]
ABSENT = object()


def look_up(value: Any, name: str) -> Any:
    """The value under a name or, where no column has that name, at the path it spells; ABSENT where there is none."""
    if isinstance(value, Mapping) and name in value:
        return value[name]
    first, dot, rest = name.partition(".")
    if not dot:
        if isinstance(value, list) and first.isdecimal() and int(first) < len(value):
            return value[int(first)]
        return ABSENT
    below = look_up(value, first)
    return ABSENT if below is ABSENT else look_up(below, rest)


def column(row: Row, name: str, columns: Columns) -> Any:
    """What a row has for a column; ABSENT where it has none. Null is the same as absent."""
    value = look_up(row.value, columns.get(name, name))
    return ABSENT if value is None else value


def text_column(row: Row, name: str, columns: Columns) -> str:
    """A text that must be there."""
    spelled = columns.get(name, name)
    value = look_up(row.value, spelled)
    if value is ABSENT:
        there = ", ".join(map(repr, sorted(row.value))) or "none"
        said = f"the column {spelled!r} is missing (there are {there}); data.columns maps other names"
        raise BadRow(row.where, said, "a column is missing")
    return clean_text(value, f"the column {spelled!r}", row)


def optional_text(row: Row, name: str, columns: Columns) -> str:
    """A text that may be absent or null: ""."""
    value = column(row, name, columns)
    return "" if value is ABSENT else clean_text(value, f"the column {columns.get(name, name)!r}", row)


def clean_text(value: Any, what: str, row: Row) -> str:
    """A text that every tokenizer can read. Raises BadRow for other types, NUL and lone surrogates."""
    if not isinstance(value, str):
        raise BadRow(row.where, f"{what} is {type(value).__name__}, a text is expected", "wrong type")
    if "\0" in value:
        said = f"the text holds a NUL (at character {value.index(chr(0))}), as binary files do; clean it"
        raise BadRow(row.where, said, "NUL in the text")
    if not value.isascii():
        try:
            require_characters(value)
        except LlmtuneDataError as error:
            raise BadRow(row.where, str(error), "lone surrogate") from None
    return value
