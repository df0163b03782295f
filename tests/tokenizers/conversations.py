"""Conversations as llmtune has them, and the same in the spelling of the references."""

import json

from llmtune.tokenizers.conversation import Conversation, Message, ToolCall

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter in <einer> Stadt, „genau“",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its name"},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
)


def said(*turns, tools=()):
    """A conversation of (role, text) pairs and messages."""
    return Conversation(tuple(t if isinstance(t, Message) else Message(*t) for t in turns), tuple(tools))


def call(name, arguments, id=None):
    return Message("assistant", "", (ToolCall(name, arguments, id),))


SINGLE = said(("user", "What is 2+2?"), ("assistant", "4"))
QUESTION = said(("user", "Hello, who are you?"))
MULTI = said(
    ("user", " Hi there \n"), ("assistant", "Hello!\n\nHow can I help?  "), ("user", "日本語 🙂\n\n\tcode: `x`"),
    ("assistant", "はい。"), ("user", "1234567 ... \"quoted\" \\n"), ("assistant", "\tok"),
)  # fmt: skip
SYSTEM = said(
    ("system", "You are terse.\nAlways."),
    ("user", "Explain it."),
    ("assistant", "No."),
    ("user", "why?"),
    ("assistant", "Ok"),
)
ONE_TOOL = said(
    ("system", "Use tools."), ("user", "first"), ("assistant", "yes?"), ("user", "Weather in Zürich?"),
    call("get_weather", {"city": "Zürich", "n": [1, 2.5, None, True, {"é": "ü\n"}]}, "abcDEF123"),
    Message("tool", '{"temperature": 21, "sky": "klar"}', tool_call_id="abcDEF123", name="get_weather"),
    ("assistant", "21 °C."), ("user", "thanks"), ("assistant", "Welcome."), tools=TOOLS,
)  # fmt: skip
TWO_CALLS = said(
    ("user", "Both?"),
    Message("assistant", "", (ToolCall("now", {}, "aaaaaaaa1"), ToolCall("get_weather", {"city": "Rom"}, "aaaaaaaa2"))),
    Message("tool", "12:00", tool_call_id="aaaaaaaa1"), Message("tool", "warm, \"really\"", tool_call_id="aaaaaaaa2"),
    ("assistant", "Noon, warm."), tools=TOOLS,
)  # fmt: skip
UNTRAINED = said(
    ("user", "a"), Message("assistant", "bad", train=False), ("user", "b"), Message("assistant", "good"),
)  # fmt: skip
PLAIN = {"single": SINGLE, "question": QUESTION, "multi": MULTI, "untrained": UNTRAINED}


def for_transformers(conversation):
    """messages and tools for apply_chat_template."""
    messages = []
    for m in conversation.messages:
        spelled = {"role": m.role, "content": m.content}
        if m.tool_calls:
            spelled["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": c.id} if c.id else {}),
                    "function": {"name": c.name, "arguments": c.arguments},
                }
                for c in m.tool_calls
            ]
        spelled |= {"tool_call_id": m.tool_call_id} if m.tool_call_id else {}
        spelled |= {"name": m.name} if m.name else {}
        messages.append(spelled)
    return messages, list(conversation.tools) or None


def for_mistral_common(conversation):
    """A ChatCompletionRequest."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    messages, tools = for_transformers(conversation)
    for message in messages:
        for c in message.get("tool_calls", []):
            c["function"] = {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}
    return ChatCompletionRequest(messages=messages, tools=tools)
