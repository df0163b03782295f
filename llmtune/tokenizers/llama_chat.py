"""The renderings of Llama 3, 3.1 and 3.2 as plain Python: Meta's published templates, with the targets known.

Every turn is `<|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>`. 3.1 and 3.2 always open with a system turn that
holds the dates, take tools in the first user turn, answer with a JSON call and read results in `ipython` turns.
"""

from llmtune.tokenizers.conversation import Conversation, Message
from llmtune.tokenizers.draft import Draft, inexpressible, spelled_json

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
WITH_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def write_llama3(draft: Draft, conversation: Conversation, prompt: bool) -> None:
    """`llama3`: turns and nothing else. Contents are stripped, as the published template does."""
    draft.control("<|begin_of_text|>")
    if conversation.tools:
        inexpressible(draft.template, "it has no tools; choose llama3.1")
    for message in _messages(draft, conversation):
        if message.role == "tool" or message.tool_calls:
            inexpressible(draft.template, "it has no tool calls and no tool results; choose llama3.1")
        _turn(draft, message.role, message.content.strip(), target=_is_target(message))
    _finish(draft, prompt)


def write_llama31(draft: Draft, conversation: Conversation, prompt: bool) -> None:
    """`llama3.1` and `llama3.2`: the date is that of the published templates, so that a run does not depend on the day."""
    messages, tools = _messages(draft, conversation), conversation.tools
    system = messages[0].content.strip() if messages[0].role == "system" else ""
    rest = messages[1:] if messages[0].role == "system" else messages
    draft.control("<|begin_of_text|>")
    _turn(draft, "system", ("Environment: ipython\n" if tools else "") + DATES + system)
    if tools:
        if not rest or rest[0].role != "user":
            inexpressible(
                draft.template, "tools are told in the first user turn, and the conversation does not begin with one"
            )
        spelled = "".join(spelled_json(draft.template, tool, indent=4) + "\n\n" for tool in tools)
        _turn(draft, "user", WITH_TOOLS + spelled + rest[0].content.strip())
        rest = rest[1:]
    for message in rest:
        if message.tool_calls:
            _turn(draft, "assistant", _call(draft, message), target=_is_target(message))
        elif message.role == "tool":
            _turn(draft, "ipython", spelled_json(draft.template, message.content))
        else:
            _turn(draft, message.role, message.content.strip(), target=_is_target(message))
    _finish(draft, prompt)


def _call(draft: Draft, message: Message) -> str:
    if len(message.tool_calls) != 1:
        inexpressible(draft.template, f"one tool call a turn, not {len(message.tool_calls)}")
    if message.content.strip():
        inexpressible(draft.template, "a turn is either text or a tool call; this one has both")
    call = message.tool_calls[0]
    return f'{{"name": "{call.name}", "parameters": {spelled_json(draft.template, call.arguments)}}}'


def _messages(draft: Draft, conversation: Conversation) -> tuple[Message, ...]:
    if not conversation.messages:
        inexpressible(draft.template, "the conversation has no messages")
    return conversation.messages


def _is_target(message: Message) -> bool:
    return message.role == "assistant" and message.train


def _turn(draft: Draft, role: str, content: str, *, target: bool = False) -> None:
    _header(draft, role)
    draft.text(content, target=target).control("<|eot_id|>", target=target)


def _header(draft: Draft, role: str) -> None:
    draft.control("<|start_header_id|>").text(role).control("<|end_header_id|>").text("\n\n")


def _finish(draft: Draft, prompt: bool) -> None:
    if prompt:
        _header(draft, "assistant")
