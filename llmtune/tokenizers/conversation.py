"""A conversation, whatever file it came from: what formats produce and chat templates render.

Formats (`llmtune.data`) turn rows into conversations; templates turn conversations into ids and know which of them the
assistant said. Nothing here depends on a tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llmtune.errors import LlmtuneDataError

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant asks for; `arguments` is the object, or the text where it is no JSON object."""

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn. `tool_call_id` and `name` belong to a tool's answer; `train` false: an assistant's turn that is no target."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `tools` as JSON schemas, in the way OpenAI's API spells them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Rendered:
    """Ids of a conversation, and for each of them whether the assistant said it (its end-of-turn token included)."""

    ids: list[int]
    targets: list[bool]


class ChatTemplate(Protocol):
    """Conversations -> ids. What a turn contains never becomes a control token, whatever it spells."""

    @property
    def name(self) -> str:
        """For the notes of a run: `llama3.1`, `mistral-v3`, `tokenizer_config.json`, ..."""
        ...

    @property
    def jinja(self) -> str | None:
        """The template as other programs read it; None where that takes two texts."""
        ...

    def encode(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """One BOS first where the family has one; `add_generation_prompt` ends with what precedes an assistant's turn.

        Raises LlmtuneDataError for a conversation that the template cannot express.
        """
        ...

    def encode_batch(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[Rendered | LlmtuneDataError]:
        """`encode` of every conversation, faster where the template runs in a process of its own; errors stand in their place."""
        ...
