"""Which characters of a rendering came from the template, and which from the conversation.

A conversation is rendered twice: once with a random word in the place of each of its strings, once as it is.

    masked:  <|user|>\\nq3f0...c1<|end|>       the template's own text is what stands between the words
    real:    <|user|>\\nHello<|end|>           the same text, with what the template made of "Hello"

Where the second is the first with each word replaced by its string (stripped or spelled as JSON, perhaps), every character is
accounted for. Where it is not, the template transforms contents, and nothing is concluded.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from llmtune.tokenizers.conversation import Conversation, Message

WORD = re.compile(r"(q[0-9a-f]{32}x[0-9]+z)")  # what `Masks` makes; every conversation has its own 32 digits
QUOTED = re.compile(r"[^ !#-\[\]-~]")  # what JSON may spell otherwise than it is
Mask = Callable[[str], str]
IDENTIFIER = re.compile(r"[A-Za-z0-9_.$-]{1,64}")


@final
@dataclass
class Masks:
    """Random words for strings. `owners` tells the message of each, None for tools."""

    controls: tuple[str, ...]
    strings: dict[str, str] = field(default_factory=dict)
    owners: dict[str, int | None] = field(default_factory=dict)
    prefix: str = field(default_factory=lambda: f"q{secrets.token_hex(16)}")

    def of_message(self, index: int) -> Mask:
        """Masks every string; blank ones stay, a template may ask for them and no control token is blank."""
        return lambda text: self._masked(text, index) if text.strip() else text

    def of_tools(self, text: str) -> str:
        """Masks all but the words of a schema, which templates compare ("object", "string"); none spells a control token."""
        return text if not text.strip() or self._is_harmless(text) else self._masked(text, None)

    def of_id(self, index: int) -> Mask:
        """Masks all ids of calls but plain ones (no part of a control token): Mistral's templates count their letters."""
        inside = "\n".join(self.controls)
        return lambda text: text if self._is_harmless(text) and text not in inside else self._masked(text, index)

    def behind_last(self, text: str) -> str | None:
        """What stands behind the last word, None where there is none."""
        parts = WORD.split(text)
        return parts[-1] if len(parts) > 1 else None

    def _is_harmless(self, text: str) -> bool:
        """Whether it is a plain word without a control token in it."""
        return bool(IDENTIFIER.fullmatch(text)) and not any(c in text for c in self.controls)

    def _masked(self, text: str, owner: int | None) -> str:
        word = f"{self.prefix}x{len(self.strings)}z"
        self.strings[word], self.owners[word] = text, owner
        return word


@final
@dataclass(frozen=True)
class Piece:
    """Characters [begin, end) of the real text, and where they begin in the masked one; `word` None: the template's own."""

    begin: int
    end: int
    masked: int
    word: str | None


def variables(
    conversation: Conversation,
    mask: Callable[[int], Mask],
    mask_ids: Callable[[int], Mask],
    mask_tools: Mask,
) -> dict[str, Any]:
    """`messages` and `tools` in the way that templates expect them, every string of the conversation passed through a mask."""
    tools = [_each_string(tool, mask_tools) for tool in conversation.tools]
    messages = [_message(m, mask(index), mask_ids(index)) for index, m in enumerate(conversation.messages)]
    return {"messages": messages, "tools": tools or None}


def aligned(masked: str, real: str, masks: Masks) -> list[Piece] | None:
    """The real text piece by piece, or None where it is not the masked one with the words replaced."""
    parts = WORD.split(masked)
    reached: list[dict[int, int]] = []  # after each part: end in the real text -> where the part begins
    ends = {0: 0}
    for part in parts:
        choices = _spellings(masks.strings[part]) if part in masks.strings else (part,)
        found: dict[int, int] = {}
        for begin in ends:
            for choice in choices:
                if real.startswith(choice, begin):
                    found.setdefault(begin + len(choice), begin)
        reached.append(found)
        ends = found
    if len(real) not in ends:
        return None
    pieces, end, at = [], len(real), len(masked)
    for part, found in zip(reversed(parts), reversed(reached), strict=True):
        at -= len(part)
        pieces.append(Piece(found[end], end, at, part if part in masks.strings else None))
        end = found[end]
    return pieces[::-1]


def in_real(position: int, pieces: Sequence[Piece]) -> int:
    """Where a position of the masked text stands in the real one; within a word, at its end."""
    for piece in pieces:
        length = piece.end - piece.begin if piece.word is None else len(piece.word)
        if position == piece.masked:
            return piece.begin
        if piece.masked < position <= piece.masked + length:
            return piece.begin + position - piece.masked if piece.word is None else piece.end
    return pieces[-1].end if pieces else 0


def _spellings(text: str) -> Iterable[str]:
    """What templates make of a string without changing what it says."""
    shapes = dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip(), text.strip("\n")))
    if not QUOTED.search(text):
        return shapes
    quoted = (json.dumps(t, ensure_ascii=ascii_only)[1:-1] for t in shapes for ascii_only in (False, True))
    return dict.fromkeys((*shapes, *quoted))


def _message(message: Message, mask: Mask, mask_id: Mask) -> dict[str, Any]:
    spelled: dict[str, Any] = {"role": message.role, "content": mask(message.content)}
    if message.tool_calls:
        spelled["tool_calls"] = [
            {
                "type": "function",
                **({} if call.id is None else {"id": mask_id(call.id)}),
                "function": {"name": mask(call.name), "arguments": _each_string(call.arguments, mask)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        spelled["tool_call_id"] = mask_id(message.tool_call_id)
    if message.name is not None:
        spelled["name"] = mask(message.name)
    return spelled


def _each_string(value: Any, mask: Mask) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {_each_string(key, mask): _each_string(item, mask) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_string(item, mask) for item in value]
    return value
