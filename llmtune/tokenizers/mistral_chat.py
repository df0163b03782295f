"""The renderings of Mistral v1, v3 and Tekken as plain Python: mistral-common's, with the targets known.

    v1       <s>| [INST] x [/INST]| y|</s>            markers are text, cut as text
    v3       <s>|[INST]| x|[/INST]| y|</s>            markers are control tokens; sentencepiece puts the blanks
    tekken   <s>|[INST]|x|[/INST]|y|</s>              the same, without blanks

A system prompt is no turn of its own: v1 puts it before the first user's text, v3 and Tekken before the last one's. Tools
stand before the last user's turn.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.tokenizers.conversation import Conversation, Message
from llmtune.tokenizers.draft import Draft, inexpressible, spelled_json

FOLLOWS = {"user": ("assistant",), "assistant": ("user",), "tool": ("assistant", "user"), "system": ()}
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def write_v1(draft: Draft, conversation: Conversation, prompt: bool) -> None:
    """`mistral-v1`: the 7B of v0.1 and v0.2, Mixtral 8x7B. Nothing stands between a user's turn and the assistant's."""
    del prompt
    system, turns = _turns(draft.template, conversation)
    if conversation.tools or any(m.tool_calls or m.role == "tool" for m in turns):
        inexpressible(draft.template, "it has no tools; choose mistral-v3")
    draft.control("<s>")
    for at, message in enumerate(turns):
        if message.role == "user":
            draft.text(f"[INST] {system if at == 0 else ''}{message.content} [/INST]")
        else:
            _require_content(draft.template, message)
            draft.text(message.content, target=message.train).control("</s>", target=message.train)


def write_v3(draft: Draft, conversation: Conversation, prompt: bool) -> None:
    """`mistral-v3` (7B v0.3, 8x22B, Small 22B) and `mistral-tekken` (Nemo): the tokenizer makes the difference.

    Ids of tool calls are nine letters and digits; others (OpenAI's `call_...`) become the same nine wherever they stand.
    """
    del prompt
    system, turns = _turns(draft.template, conversation)
    last = max(at for at, message in enumerate(turns) if message.role == "user")
    draft.control("<s>")
    open_calls: list[str] = []
    for at, message in enumerate(turns):
        if message.role == "user":
            if at == last and conversation.tools:
                tools = spelled_json(draft.template, [_tool(draft.template, tool) for tool in conversation.tools])
                draft.control("[AVAILABLE_TOOLS]").text(tools).control("[/AVAILABLE_TOOLS]")
            text = (system if at == last else "") + message.content
            draft.control("[INST]").text(text).control("[/INST]")
        elif message.role == "tool":
            _add_result(draft, message, open_calls.pop(0))
        elif message.tool_calls:
            open_calls = [_call_id(call.id, f"{at}.{i}") for i, call in enumerate(message.tool_calls)]
            _add_calls(draft, message, open_calls)
        else:
            _require_content(draft.template, message)
            draft.text(message.content.rstrip(" "), target=message.train).control("</s>", target=message.train)


def _add_calls(draft: Draft, message: Message, ids: Sequence[str]) -> None:
    if message.content:
        inexpressible(draft.template, "a turn is either text or tool calls; this one has both")
    calls = [
        {"name": call.name, "arguments": _arguments(draft.template, call.arguments), "id": call_id}
        for call, call_id in zip(message.tool_calls, ids, strict=True)
    ]
    draft.control("[TOOL_CALLS]", target=message.train)
    draft.text(spelled_json(draft.template, calls), target=message.train).control("</s>", target=message.train)


def _add_result(draft: Draft, message: Message, in_turn: str) -> None:
    call_id = in_turn if message.tool_call_id is None else _call_id(message.tool_call_id, "")
    result = {"content": _arguments(draft.template, message.content), "call_id": call_id}
    draft.control("[TOOL_RESULTS]").text(spelled_json(draft.template, result)).control("[/TOOL_RESULTS]")


def _turns(template: str, conversation: Conversation) -> tuple[str, tuple[Message, ...]]:
    """The system prompt as it is put before a text, and the turns after it, checked for their order."""
    messages = conversation.messages
    has_system = bool(messages) and messages[0].role == "system"
    system = messages[0].content + "\n\n" if has_system and messages[0].content else ""
    turns = messages[1:] if has_system else messages
    if not turns or turns[0].role != "user":
        inexpressible(template, "the first turn must be the user's")
    waiting = 0  # tool results that must come
    for before, message in itertools.pairwise(turns):
        if before.tool_calls:
            waiting = len(before.tool_calls)
        if message.role == "tool":
            if not waiting:
                inexpressible(template, "a tool's result answers no call")
            waiting -= 1
        elif waiting:
            inexpressible(
                template, f"{waiting} tool calls have no result before the turn of {message.role!r} that follows"
            )
        elif message.role not in FOLLOWS[before.role]:
            inexpressible(
                template, f"a turn of {message.role!r} cannot follow one of {before.role!r}: they must alternate"
            )
    return system, turns


def _require_content(template: str, message: Message) -> None:
    if not message.content:
        inexpressible(template, "an assistant's turn has neither text nor a tool call")


def _tool(template: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        inexpressible(template, "a tool must be an object with a function and its name")
    kept = {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or {},
    }
    return {"type": "function", "function": kept}


def _arguments(template: str, value: Mapping[str, Any] | str) -> Any:
    """What a text says as JSON, else the text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value else {}
    except ValueError:
        return value
    except RecursionError:
        inexpressible(template, "a tool's JSON is nested too deeply")


def _call_id(given: str | None, place: str) -> str:
    if given is not None and CALL_ID.fullmatch(given):
        return given
    return hashlib.sha256((place if given is None else given).encode("utf-8", "surrogatepass")).hexdigest()[:9]
