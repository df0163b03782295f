"""A built-in chat template: a function that writes a conversation into a draft, and the same said in Jinja.

PlainChat("llama3", tokenizer, write_llama3, LLAMA3).encode(conversation)  -->  ids, and which of them are targets
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers.conversation import Conversation, Rendered
from llmtune.tokenizers.draft import Draft
from llmtune.tokenizers.protocol import Tokenizer

Write = Callable[[Draft, Conversation, bool], None]  # the last: whether to end with what precedes an assistant's turn


@final
@dataclass(frozen=True)
class PlainChat:
    """`jinja` is what other programs read (see `ChatTemplate.jinja`)."""

    name: str
    tokenizer: Tokenizer
    write: Write
    jinja: str | None

    def encode(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """See `ChatTemplate.encode`."""
        draft = Draft(self.name, self.tokenizer)
        self.write(draft, conversation, add_generation_prompt)
        return draft.rendered

    def encode_batch(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[Rendered | LlmtuneDataError]:
        """See `ChatTemplate.encode_batch`."""
        rendered: list[Rendered | LlmtuneDataError] = []
        for conversation in conversations:
            try:
                rendered.append(self.encode(conversation, add_generation_prompt=add_generation_prompt))
            except LlmtuneDataError as error:
                rendered.append(error)
        return rendered
