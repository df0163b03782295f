"""What a run reads: the keys under `data`, and what no single one of them can say."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key
from llmtune.errors import LlmtuneConfigError

Format = Literal["auto", "messages", "sharegpt", "alpaca", "dolly", "prompt_completion", "text", "tokens"]
COLUMNS = (
    "messages", "conversations", "instruction", "input", "output", "context", "response", "system", "history", "tools",
    "prompt", "completion", "text",
)  # fmt: skip


@dataclass(frozen=True)
class DataSource:
    """One item of a mixture, where a path alone does not say enough."""

    path: str = key("a file, a directory (all data files below it), or a pattern such as chats/*.jsonl.gz")
    weight: float = key("passes through it per epoch: 0.5 is half of its rows, the other half in the next epoch", 1.0)
    format: Format | None = key("of its rows; null: data.format", None)
    columns: dict[str, str] | None = key("its column names; null: data.columns", None)
    license: str | None = key("under which it is published, for the model card; null: not stated", None)


@dataclass(frozen=True)
class Data:
    """What is read, and how it becomes rows of tokens."""

    train: str | list[str | DataSource] = key(
        "a file (jsonl, json, csv, txt, parquet; also .gz, .bz2, .xz, .zst), a directory, a pattern, or a list of them"
    )
    validation: str | list[str | DataSource] | None = key(
        "held-out rows, evaluated before, during and after; written like data.train, without weights", None
    )
    format: Format = key("of the rows; auto goes by the columns of the first one, and says what it found", "auto")
    chat_template: str | None = key(
        "null: the model's own; or the name of a built-in one (llama3.1, ...), or the path of a .jinja file", None
    )
    sequence_length: int = key("tokens per row of the batch", 1024)
    packing: bool = key("several documents per row, by a plan; each sees only itself", True)
    streaming: bool = key(
        "data.train is read while training goes on, never as a whole: objective pretrain, weights are shares of the tokens",
        False,
    )
    shuffle: bool = key("a new order every epoch, from train.seed; false: file order", True)
    too_long: Literal["truncate", "drop", "error"] = key(
        "rows beyond sequence_length (text is split instead)", "truncate"
    )
    invalid: Literal["error", "skip"] = key(
        "rows that cannot be used: the first one is an error, or they are counted", "error"
    )
    max_skipped: float = key("largest share of rows that invalid: skip may leave out", 0.01)
    columns: dict[str, str] = key(
        "other column names, e.g. {prompt: question, completion: answer}, or paths: {output: instances.0.output}", {}
    )
    tokenizer: str | None = key("a directory with a tokenizer other than the model's", None)
    add_tokens: list[str] = key("new words of the vocabulary: their spelling in any text is one token", [])
    add_special_tokens: list[str] = key("new control tokens: only a chat template's own text makes them", [])
    pad_vocabulary_to: int = key("a vocabulary that added tokens outgrow is rounded up to a multiple of this", 64)


def check_data(data: Data, require: Callable[[bool, str, str], None]) -> None:
    """Raises LlmtuneConfigError naming the key; `require(condition, path, said)` is how a run says it."""
    for path, given in (("data.train", data.train), ("data.validation", data.validation)):
        sources = sources_of(given)
        require((bool(sources) and all(own.path for own in sources)) or given is None, path, "no file is given")
        for source in sources:
            require(0 < source.weight < math.inf, f"{path}.weight", f"{source.weight} must be a positive number")
            require(source.weight == 1 or given is data.train, path, "weights belong to training data")
            _require_columns(f"{path}.columns", source.columns or {})
    _require_columns("data.columns", data.columns)
    require(0 <= data.max_skipped <= 1, "data.max_skipped", f"{data.max_skipped} must lie in 0..1")
    length = data.sequence_length
    require(
        2 <= length < 2**31, "data.sequence_length", f"{length} is too {'short; 2 or more' if length < 2 else 'long'}"
    )
    added = added_tokens(data)
    for place, (path, token) in enumerate(added):
        require(token.strip() != "", path, f"{token!r} is empty; give the spelling of a token")
        require(_is_text(token), path, f"{token!r} holds a lone surrogate, which is no character")
        require(token not in [other for _, other in added[:place]], path, f"{token!r} is given twice")
    require(data.pad_vocabulary_to > 0, "data.pad_vocabulary_to", f"{data.pad_vocabulary_to} must be positive")


def added_tokens(data: Data) -> list[tuple[str, str]]:
    """(the key that adds it, its spelling) of every added token."""
    added = [("data.add_tokens", token) for token in data.add_tokens]
    return added + [("data.add_special_tokens", token) for token in data.add_special_tokens]


def sources_of(given: str | list[str | DataSource] | None) -> list[DataSource]:
    """data.train or data.validation as a list of sources."""
    items = [] if given is None else [given] if isinstance(given, str) else given
    return [DataSource(item) if isinstance(item, str) else item for item in items]


def require_room(virtual_tokens: int, data: Data, path: str) -> None:
    """Whether rows can begin with so many virtual tokens; `path`: the key that asks for them."""
    if data.packing:
        raise LlmtuneConfigError(
            f"data.packing: virtual tokens ({path}) stand before a row, which therefore holds one document; "
            "set data.packing: false"
        )
    if virtual_tokens >= data.sequence_length:
        raise LlmtuneConfigError(
            f"{path}: {virtual_tokens} virtual tokens are longer than the rows of data.sequence_length "
            f"{data.sequence_length}; take fewer, or longer rows"
        )


def _is_text(token: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in token)


def _require_columns(path: str, columns: dict[str, str]) -> None:
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise LlmtuneConfigError(f"{path}: {unknown[:1]} is no column here; there are {', '.join(COLUMNS)}")
