"""Rows -> what is to be tokenised, for each format; and which format the columns of a row reveal.

    tokens              {"input_ids": [...], "labels": [...]}; -100 where there is no loss; labels default to the ids
    text                {"text": ...}                    BOS text EOS; everything is a target
    prompt_completion   {"prompt": ..., "completion": ...}    BOS prompt completion EOS; completion and EOS are targets,
                        with `objective: pretrain` the prompt too
    messages, sharegpt  conversations, rendered by the chat template; the assistant's turns are targets
    alpaca, dolly       a conversation of one exchange; without a chat template the published Alpaca prompt, as
                        prompt_completion

Prompt and completion are tokenised apart, so that the boundary lies between tokens whatever the text.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from llmtune.data.columns import ABSENT, Columns, column, look_up, optional_text, text_column
from llmtune.data.conversations import instruction_conversation, prompt_conversation, turns_conversation
from llmtune.data.encoding import Draft, Encoder, Parts, size_of
from llmtune.data.example import IGNORED, Example
from llmtune.data.invalid import BadRow, Refuse, stop
from llmtune.data.rows import Row
from llmtune.data.spans import Where
from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import Tokenizer
from llmtune.tokenizers.conversation import ChatTemplate, Conversation

COLUMNS = {  # format: the columns that reveal it, in the order of trying
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
NO_TARGET = "the row has no target token; remove it, or fill in its completion"
BEFORE_CHOICE = (
    "; this is a file of preferences: data.columns {completion: chosen} trains on the answer that was chosen"
)
NEEDS_TEMPLATE = (
    "needs a chat template, and the model has none; set data.chat_template to the name of a built-in one "
    "(llama3, llama3.1, mistral-v3, ...) or to the path of a .jinja file"
)
# The wording published with the Alpaca data set: models that were trained on it expect every character.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
BATCH_ROWS, BATCH_CHARACTERS = 1024, 1 << 21


@dataclass(frozen=True)
class Formatter:
    """One format: from a row to what is to be tokenised, and the tokenising of many at once."""

    name: str
    draft: Callable[[Row], Draft]
    encoder: Encoder


def detect_format(row: Row, columns: Columns) -> str:
    """The format of a row, by its columns; one whose columns the user all maps comes before those that he does not."""
    fitting = [
        name
        for name, needed in COLUMNS.items()
        if all(look_up(row.value, columns.get(own, own)) is not ABSENT for own in needed)
    ]
    for name in (*(name for name in fitting if set(COLUMNS[name]) <= set(columns)), *fitting):
        return name
    raise BadRow(
        row.where,
        f"no format has the columns {sorted(row.value)}; formats are "
        + "; ".join(f"{name} ({', '.join(needed)})" for name, needed in COLUMNS.items())
        + "; data.columns maps other names, e.g. {prompt: question, completion: answer}"
        + (", or {text: chosen} for whole texts of a file of preferences" if "chosen" in row.value else ""),
        "unknown columns",
    )


def make_formatter(
    name: str,
    tokenizer: Tokenizer | None,
    columns: Columns,
    vocab_size: int,
    *,
    pretrain: bool = False,
    template: ChatTemplate | None = None,
) -> Formatter:
    """The formatter of one format; `pretrain`: prompts are targets too."""
    if name != "tokens" and tokenizer is None:
        raise LlmtuneDataError(
            f"data.format: {name} needs a tokenizer, and the model's directory has none; set data.tokenizer"
        )
    if name in ("messages", "sharegpt") and template is None:
        raise LlmtuneDataError(f"data.format: {name} {NEEDS_TEMPLATE}")
    drafts: dict[str, Callable[[Row], Draft]] = {
        "tokens": lambda row: _tokens(row, vocab_size),
        "messages": lambda row: turns_conversation(row, "messages", columns),
        "sharegpt": lambda row: turns_conversation(row, "sharegpt", columns),
        "alpaca": lambda row: _instruction(row, "input", "output", columns, template),
        "dolly": lambda row: _instruction(row, "context", "response", columns, template),
        "prompt_completion": lambda row: _prompt_completion(row, columns, template),
        "text": lambda row: Parts((text_column(row, "text", columns),), (True,), cut="pieces"),
    }
    return Formatter(name, drafts[name], Encoder(tokenizer, template, pretrain))


def uses_template(name: str, row: Row | None = None, columns: Columns = MappingProxyType({})) -> bool:
    """Whether rows of a format, of which `row` is the first, are conversations where there is a chat template."""
    turns = name == "prompt_completion" and row is not None and isinstance(column(row, "prompt", columns), list)
    return turns or name in ("messages", "sharegpt", "alpaca", "dolly")


def read_examples(rows: Iterable[Row], formatter: Formatter, refuse: Refuse = stop) -> Iterator[Example]:
    """Examples of rows; one without any target is a bad row, since it could teach nothing."""
    batch: list[tuple[Draft, Where]] = []
    size = 0
    for row in rows:
        try:
            draft = formatter.draft(row)
            if isinstance(draft, Conversation) and not (formatter.encoder.pretrain or _has_targets(draft)):
                raise BadRow(row.where, NO_TARGET, "no target")
        except BadRow as error:
            refuse(error)
            continue
        batch.append((draft, row.where))
        size += size_of(draft)
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield from _encoded(batch, formatter, refuse)
            batch, size = [], 0
    yield from _encoded(batch, formatter, refuse)


def _has_targets(conversation: Conversation) -> bool:
    return any(turn.role == "assistant" and turn.train for turn in conversation.messages)


def _encoded(batch: list[tuple[Draft, Where]], formatter: Formatter, refuse: Refuse) -> Iterator[Example]:
    for found in formatter.encoder.encode(batch):
        if isinstance(found, BadRow):
            refuse(found)
        elif found.has_targets:
            yield found
        else:
            refuse(BadRow(found.where, NO_TARGET, "no target"))


def _instruction(row: Row, context: str, answer: str, columns: Columns, template: ChatTemplate | None) -> Draft:
    if template is not None:
        return instruction_conversation(row, context, answer, columns)
    for name in ("system", "history"):
        if column(row, name, columns) not in (ABSENT, "", []):
            said = f"the column {columns.get(name, name)!r} {NEEDS_TEMPLATE}"
            raise BadRow(row.where, said, "needs a chat template")
    prompt = instruction_prompt(text_column(row, "instruction", columns), optional_text(row, context, columns))
    return Parts((prompt, text_column(row, answer, columns)), (False, True))


def instruction_prompt(instruction: str, given: str = "") -> str:
    """The published Alpaca prompt."""
    return (
        WITH_INPUT.format(instruction=instruction, input=given)
        if given
        else WITHOUT_INPUT.format(instruction=instruction)
    )


def _prompt_completion(row: Row, columns: Columns, template: ChatTemplate | None) -> Draft:
    if isinstance(column(row, "prompt", columns), list):
        if template is None:
            raise BadRow(row.where, f"a prompt of turns {NEEDS_TEMPLATE}", "needs a chat template")
        return prompt_conversation(row, columns)
    return Parts((text_column(row, "prompt", columns), text_column(row, "completion", columns)), (False, True))


def _tokens(row: Row, vocab_size: int) -> Example:
    ids = _integers(row, "input_ids", 0, vocab_size)
    labels = _integers(row, "labels", 0, vocab_size, IGNORED) if "labels" in row.value else ids.copy()
    if len(labels) != len(ids):
        said = f"{len(ids)} input_ids but {len(labels)} labels; they are aligned one to one"
        raise BadRow(row.where, said, "labels of another length")
    return Example(ids, labels, row.where)


def _integers(row: Row, column: str, low: int, high: int, also: int | None = None) -> np.ndarray:
    value = row.value.get(column)
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise BadRow(row.where, f"{column} must be a list of integers", "wrong type")
    wrong = next((v for v in value if not (low <= v < high or v == also)), None)
    if wrong is not None:
        said = f"{column} holds {wrong}; token ids of this model lie in {low}..{high - 1}"
        raise BadRow(row.where, said, "ids outside the vocabulary")
    return np.array(value, np.int32)
