"""Rows that hold conversations, in the spellings that are in use -> `Conversation`.

    messages   {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    sharegpt   {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    alpaca     {"instruction": "Say hello.", "input": "", "output": "Hello"}, with "system" and "history" as they come
    dolly      {"instruction": "Say hello.", "context": "", "response": "Hello"}

Of the turns those of the assistant are targets, but for turns with `"weight": 0` and empty ones.
"""

import json
from collections.abc import Mapping
from typing import Any

from llmtune.data.columns import ABSENT, Columns, clean_text, column, optional_text, text_column
from llmtune.data.invalid import BadRow
from llmtune.data.rows import Row
from llmtune.tokenizers.conversation import Conversation, Message, Role, ToolCall

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
TURNS = {"messages": "messages", "sharegpt": "conversations"}  # format: its column


def turns_conversation(row: Row, name: str, columns: Columns) -> Conversation:
    """Of `messages` and `sharegpt`. A `completion` column that the user maps is one more turn of the assistant."""
    turns = _turns(row, TURNS[name], columns)
    if "completion" in columns:
        turns = (*turns, *_answer(row, columns))
    elif turns[-1].role != "assistant" and column(row, "chosen", columns) is not ABSENT:
        said = "a row of preferences: data.columns {completion: chosen} trains on the answers that were chosen"
        raise BadRow(row.where, said, "preferences")
    system = optional_text(row, "system", columns)
    if system and turns[0].role != "system":
        turns = (Message("system", system), *turns)
    return Conversation(turns, _tools(row, columns))


def prompt_conversation(row: Row, columns: Columns) -> Conversation:
    """Of `prompt_completion` whose two columns are lists of turns: those of the prompt are no targets."""
    prompt = tuple(
        Message(turn.role, turn.content, turn.tool_calls, turn.tool_call_id, turn.name, train=False)
        for turn in _turns(row, "prompt", columns)
    )
    return Conversation((*prompt, *_answer(row, columns)), _tools(row, columns))


def instruction_conversation(row: Row, context: str, answer: str, columns: Columns) -> Conversation:
    """Of `alpaca` and `dolly`: instruction and input, a newline between them, are the user's turn."""
    instruction, given = text_column(row, "instruction", columns), optional_text(row, context, columns)
    system = optional_text(row, "system", columns)
    said = text_column(row, answer, columns)
    return Conversation((
        *((Message("system", system),) if system else ()),
        *_history(row, columns),
        Message("user", f"{instruction}\n{given}" if given else instruction),
        Message("assistant", said, train=bool(said.strip())),
    ))  # fmt: skip


def _history(row: Row, columns: Columns) -> tuple[Message, ...]:
    pairs = column(row, "history", columns)
    if pairs is ABSENT:
        return ()
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRow(row.where, "history must be a list of [question, answer]", "wrong type")
    texts = [[clean_text(text, "a turn of history", row) for text in pair] for pair in pairs]
    return tuple(
        message
        for question, answer in texts
        for message in (Message("user", question), Message("assistant", answer, train=bool(answer.strip())))
    )


def _turns(row: Row, name: str, columns: Columns) -> tuple[Message, ...]:
    spelled, turns = columns.get(name, name), column(row, name, columns)
    if not isinstance(turns, list):
        kind = "missing" if turns is ABSENT else type(turns).__name__
        raise BadRow(row.where, f"the column {spelled!r} is {kind}, a list of turns is expected", "wrong type")
    if not turns:
        raise BadRow(row.where, f"the column {spelled!r} holds no turn", "no turns")
    return tuple(_message(turn, f"{spelled}.{number}", row) for number, turn in enumerate(turns))


def _answer(row: Row, columns: Columns) -> tuple[Message, ...]:
    """The column `completion`: a text, a turn, or a list of turns."""
    spelled, value = columns.get("completion", "completion"), column(row, "completion", columns)
    if isinstance(value, list):
        return _turns(row, "completion", columns)
    if isinstance(value, Mapping):
        return (_message(value, spelled, row),)
    text = clean_text("" if value is ABSENT else value, f"the column {spelled!r}", row)
    return (Message("assistant", text, train=bool(text.strip())),)


def _message(turn: Any, where: str, row: Row) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(row.where, f"{where} is {type(turn).__name__}, a turn is an object with a role", "wrong type")
    spelled = turn.get("role", turn.get("from"))
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    if role is None:
        raise BadRow(row.where, f"{where}: {spelled!r} is no role; there are {', '.join(ROLES)}", "unknown role")
    content = turn.get("content", turn.get("value"))
    if spelled == "function_call":
        return Message("assistant", "", _spelled_calls(content, where, row))
    calls = _calls(turn.get("tool_calls"), where, row)
    text = "" if content is None and calls else _content(content, where, row)
    return Message(
        role,
        text,
        calls,
        tool_call_id=_name(turn.get("tool_call_id"), f"{where}.tool_call_id", row),
        name=_name(turn.get("name"), f"{where}.name", row),
        train=_trains(turn, where, row) and (bool(text.strip()) or bool(calls) or role != "assistant"),
    )


def _content(value: Any, where: str, row: Row) -> str:
    """A text, or a list of parts as OpenAI's API has them."""
    if not isinstance(value, list):
        return clean_text(value, f"the content of {where}", row)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(
                row.where, f"{where} has a part of type {kind!r}; only text is read", "content that is no text"
            )
    return "".join(clean_text(part.get("text"), f"the text of {where}", row) for part in value)


def _trains(turn: Mapping[str, Any], where: str, row: Row) -> bool:
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(row.where, f"{where}.weight is {weight!r}; 0 and 1 are weights of a turn", "wrong type")
    return weight != 0


def _name(value: Any, what: str, row: Row) -> str | None:
    return None if value is None else clean_text(value, what, row)


def _calls(value: Any, where: str, row: Row) -> tuple[ToolCall, ...]:
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise BadRow(row.where, f"{where}.tool_calls must be a list of calls", "wrong type")
    return tuple(
        _call(call.get("function", call), _name(call.get("id"), f"{where}.tool_calls.id", row), where, row)
        for call in value
    )


def _spelled_calls(value: Any, where: str, row: Row) -> tuple[ToolCall, ...]:
    """Of a `function_call` turn: JSON of one call, or of a list of them."""
    text = clean_text(value, f"the content of {where}", row)
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(row.where, f"{where} is no JSON of a call with name and arguments", "bad tool call") from None
    return tuple(_call(call, None, where, row) for call in (calls if isinstance(calls, list) else [calls]))


def _call(value: Any, identity: str | None, where: str, row: Row) -> ToolCall:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise BadRow(row.where, f"{where}: a call of a tool is an object with name and arguments", "bad tool call")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else clean_text(arguments, f"the arguments of {where}", row)
    if not isinstance(arguments, Mapping | str):
        raise BadRow(row.where, f"{where}: arguments must be an object or its JSON", "bad tool call")
    return ToolCall(clean_text(value["name"], f"the name in {where}", row), arguments, identity)


def _tools(row: Row, columns: Columns) -> tuple[Mapping[str, Any], ...]:
    """A list of schemas or its JSON; bare functions, as ShareGPT files have them, are put the way OpenAI spells them."""
    tools = column(row, "tools", columns)
    if tools is ABSENT or tools == "":
        return ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow(row.where, "tools is no JSON", "bad tools") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(row.where, "tools must be a list of JSON schemas", "bad tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
