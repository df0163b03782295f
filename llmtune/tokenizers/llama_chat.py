"""The renderings of Llama 3, 3.1 and 3.2 as plain Python: Meta's published templates, with the targets known.

Every turn is `<|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>`. 3.1 and 3.2 always open with a system turn that
holds the dates, take tools in the first user turn, answer with a JSON call and read results in `ipython` turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers.conversation import Conversation, Message, Rendered
from llmtune.tokenizers.draft import Draft, inexpressible, one_by_one, spelled_json
from llmtune.tokenizers.llama_jinja import LLAMA3, with_tools
from llmtune.tokenizers.protocol import Tokenizer

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
WITH_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


@final
@dataclass(frozen=True)
class Llama3:
    """`llama3`: turns and nothing else. Contents are stripped, as the published template does."""

    tokenizer: Tokenizer
    name: str = "llama3"

    @property
    def jinja(self) -> str | None:
        """See `ChatTemplate.jinja`."""
        return LLAMA3

    def encode(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """See `ChatTemplate.encode`."""
        draft = Draft(self.tokenizer).control("<|begin_of_text|>")
        if conversation.tools:
            inexpressible(self.name, "it has no tools; choose llama3.1")
        for message in _messages(self.name, conversation):
            if message.role == "tool" or message.tool_calls:
                inexpressible(self.name, "it has no tool calls and no tool results; choose llama3.1")
            _turn(draft, message.role, message.content.strip(), target=_is_target(message))
        return _finished(draft, add_generation_prompt)

    def encode_batch(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[Rendered | LlmtuneDataError]:
        """See `ChatTemplate.encode_batch`."""
        return one_by_one(partial(self.encode, add_generation_prompt=add_generation_prompt), conversations)


@final
@dataclass(frozen=True)
class Llama31:
    """`llama3.1` and `llama3.2`: the date is that of the published templates, so that a run does not depend on the day."""

    tokenizer: Tokenizer
    name: str = "llama3.1"

    @property
    def jinja(self) -> str | None:
        """See `ChatTemplate.jinja`."""
        return with_tools(DATES, WITH_TOOLS)

    def encode(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """See `ChatTemplate.encode`."""
        messages, tools = _messages(self.name, conversation), conversation.tools
        system = messages[0].content.strip() if messages[0].role == "system" else ""
        rest = messages[1:] if messages[0].role == "system" else messages
        draft = Draft(self.tokenizer).control("<|begin_of_text|>")
        _turn(draft, "system", ("Environment: ipython\n" if tools else "") + DATES + system)
        if tools:
            if not rest or rest[0].role != "user":
                inexpressible(
                    self.name, "tools are told in the first user turn, and the conversation does not begin with one"
                )
            spelled = "".join(spelled_json(self.name, tool, indent=4) + "\n\n" for tool in tools)
            _turn(draft, "user", WITH_TOOLS + spelled + rest[0].content.strip())
            rest = rest[1:]
        for message in rest:
            self._add(draft, message)
        return _finished(draft, add_generation_prompt)

    def encode_batch(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[Rendered | LlmtuneDataError]:
        """See `ChatTemplate.encode_batch`."""
        return one_by_one(partial(self.encode, add_generation_prompt=add_generation_prompt), conversations)

    def _add(self, draft: Draft, message: Message) -> None:
        if message.tool_calls:
            _turn(draft, "assistant", self._call(message), target=_is_target(message))
        elif message.role == "tool":
            _turn(draft, "ipython", spelled_json(self.name, message.content))
        else:
            _turn(draft, message.role, message.content.strip(), target=_is_target(message))

    def _call(self, message: Message) -> str:
        if len(message.tool_calls) != 1:
            inexpressible(self.name, f"one tool call a turn, not {len(message.tool_calls)}")
        if message.content.strip():
            inexpressible(self.name, "a turn is either text or a tool call; this one has both")
        call = message.tool_calls[0]
        return f'{{"name": "{call.name}", "parameters": {spelled_json(self.name, call.arguments)}}}'


def _messages(template: str, conversation: Conversation) -> tuple[Message, ...]:
    if not conversation.messages:
        inexpressible(template, "the conversation has no messages")
    return conversation.messages


def _is_target(message: Message) -> bool:
    return message.role == "assistant" and message.train


def _turn(draft: Draft, role: str, content: str, *, target: bool = False) -> None:
    _header(draft, role)
    draft.text(content, target=target).control("<|eot_id|>", target=target)


def _header(draft: Draft, role: str) -> None:
    draft.control("<|start_header_id|>").text(role).control("<|end_header_id|>").text("\n\n")


def _finished(draft: Draft, add_generation_prompt: bool) -> Rendered:
    if add_generation_prompt:
        _header(draft, "assistant")
    return draft.rendered
