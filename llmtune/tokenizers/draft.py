"""A rendering in the making: control tokens by id, texts that never become control tokens.

    draft.control("<|start_header_id|>").text("user").control("<|end_header_id|>").text("\\n\\nhi").control("<|eot_id|>")

Each text is tokenised by itself, as the reference libraries of the built-in templates do it.
"""

import json
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self, final

from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers.conversation import Rendered
from llmtune.tokenizers.protocol import Tokenizer


@final
@dataclass(frozen=True)
class Draft:
    """Ids and targets so far; `template` is the name that errors say."""

    template: str
    tokenizer: Tokenizer
    rendered: Rendered = field(default_factory=lambda: Rendered([], []))

    def ids(self, ids: list[int], *, target: bool = False) -> Self:
        """Append ids as they are."""
        self.rendered.ids.extend(ids)
        self.rendered.targets.extend([target] * len(ids))
        return self

    def control(self, spelling: str, *, target: bool = False) -> Self:
        """Append a control token of the vocabulary."""
        return self.ids([self.tokenizer.controls[spelling]], target=target)

    def text(self, text: str, *, target: bool = False) -> Self:
        """Append a text; whatever it spells, it gives no control token."""
        return self.ids(self.tokenizer.encode(text, bos=False), target=target)


def inexpressible(template: str, why: str) -> NoReturn:
    """Refuse a conversation."""
    raise LlmtuneDataError(f"chat template {template}: {why}")


def spelled_json(template: str, value: Any, indent: int | None = None) -> str:
    """A value as templates spell it; a conversation that holds what is no JSON is refused."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        inexpressible(template, f"a tool call or a tool holds what is no JSON ({' '.join(str(error).split())[:100]})")
