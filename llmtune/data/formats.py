"""Rows -> examples: token ids with labels, aligned (the shift to next-token targets happens in the loss).

    tokens              {"input_ids": [...], "labels": [...]}; -100 where there is no loss; labels default to the ids
    text                {"text": ...}                    BOS text EOS; everything is a target
    prompt_completion   {"prompt": ..., "completion": ...}    BOS prompt completion EOS; completion and EOS are targets,
                        with `objective: pretrain` the prompt too

Prompt and completion are tokenised apart, so that the boundary lies between tokens whatever the text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.data.rows import Row
from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import Tokenizer

IGNORED = -100
COLUMNS = {"tokens": ("input_ids",), "text": ("text",), "prompt_completion": ("prompt", "completion")}


@dataclass(frozen=True)
class Example:
    """int32 `input_ids` and `labels` of equal length; `splittable` where a long one may be cut into several."""

    input_ids: np.ndarray
    labels: np.ndarray
    where: str
    splittable: bool = False


Formatter = Callable[[Row], Example]


def detect_format(row: Row, columns: Mapping[str, str]) -> str:
    """The format of a first row, by its columns."""
    for name, needed in COLUMNS.items():
        if all(columns.get(column, column) in row.value for column in needed):
            return name
    raise LlmtuneDataError(
        f"{row.where}: no format has the columns {sorted(row.value)}; formats are "
        + "; ".join(f"{name} ({', '.join(needed)})" for name, needed in COLUMNS.items())
        + "; data.columns maps other names, e.g. {prompt: question, completion: answer}"
    )


def make_formatter(
    name: str, tokenizer: Tokenizer | None, columns: Mapping[str, str], vocab_size: int, *, pretrain: bool = False
) -> Formatter:
    """The function from rows of one format to examples; `pretrain`: prompts are targets too."""
    if name == "tokens":
        return lambda row: _tokens(row, vocab_size)
    if tokenizer is None:
        raise LlmtuneDataError(
            f"data.format: {name} needs a tokenizer, and the model's directory has none; set data.tokenizer"
        )
    if name == "text":
        return lambda row: _text(row, tokenizer, columns)
    return lambda row: _prompt_completion(row, tokenizer, columns, pretrain)


def read_examples(rows: Iterable[Row], formatter: Formatter) -> Iterator[Example]:
    """Examples of rows; one without any target is an error, since it could teach nothing."""
    for row in rows:
        example = formatter(row)
        if not np.any(example.labels[1:] != IGNORED):
            raise LlmtuneDataError(f"{row.where}: the row has no target token; remove it, or fill in its completion")
        yield example


def _tokens(row: Row, vocab_size: int) -> Example:
    ids = _integers(row, "input_ids", 0, vocab_size)
    labels = _integers(row, "labels", 0, vocab_size, IGNORED) if "labels" in row.value else ids.copy()
    if len(labels) != len(ids):
        raise LlmtuneDataError(
            f"{row.where}: {len(ids)} input_ids but {len(labels)} labels; they are aligned one to one"
        )
    return Example(ids, labels, row.where)


def _text(row: Row, tokenizer: Tokenizer, columns: Mapping[str, str]) -> Example:
    ids = np.array(
        [*_encode(tokenizer, _string(row, "text", columns), row, bos=True), *tokenizer.eos_ids[:1]], np.int32
    )
    labels = ids.copy()
    if tokenizer.bos_id is not None:
        labels[0] = IGNORED
    return Example(ids, labels, row.where, splittable=True)


def _prompt_completion(row: Row, tokenizer: Tokenizer, columns: Mapping[str, str], pretrain: bool) -> Example:
    prompt = _encode(tokenizer, _string(row, "prompt", columns), row, bos=True)
    text = _string(row, "completion", columns)
    completion = [*_encode(tokenizer, text, row, bos=False), *tokenizer.eos_ids[:1]] if text else []
    ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    if pretrain:
        labels[1:] = ids[1:]
    return Example(np.array(ids, np.int32), np.array(labels, np.int32), row.where)


def _encode(tokenizer: Tokenizer, text: str, row: Row, *, bos: bool) -> list[int]:
    try:
        return tokenizer.encode(text, bos=bos)
    except LlmtuneDataError as error:
        raise LlmtuneDataError(f"{row.where}: {error}") from None


def _string(row: Row, column: str, columns: Mapping[str, str]) -> str:
    name = columns.get(column, column)
    if name not in row.value:
        raise LlmtuneDataError(
            f"{row.where}: the column {name!r} is missing (there are {', '.join(map(repr, sorted(row.value))) or 'none'}); "
            "data.columns maps other names"
        )
    value = row.value[name]
    if not isinstance(value, str):
        raise LlmtuneDataError(f"{row.where}: the column {name!r} is {type(value).__name__}, a text is expected")
    return value


def _integers(row: Row, column: str, low: int, high: int, also: int | None = None) -> np.ndarray:
    value: Any = row.value.get(column)
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise LlmtuneDataError(f"{row.where}: {column} must be a list of integers")
    wrong = next((v for v in value if not (low <= v < high or v == also)), None)
    if wrong is not None:
        raise LlmtuneDataError(f"{row.where}: {column} holds {wrong}; token ids of this model lie in {low}..{high - 1}")
    return np.array(value, np.int32)
