"""The two ends of an answer: the ids that ask for it, and the ids that end it."""

from llmtune.tokenizers.conversation import ChatTemplate, Conversation, Message
from llmtune.tokenizers.protocol import Tokenizer

SMALLEST = Conversation((Message("user", "a"), Message("assistant", "b")))


def chat_prompt(template: ChatTemplate, prompt: str, system: str | None = None) -> list[int]:
    """Ids of a conversation that waits for the assistant's answer to one prompt."""
    turns = (*((Message("system", system),) if system else ()), Message("user", prompt))
    return template.encode(Conversation(turns), add_generation_prompt=True).ids


def end_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[int, ...]:
    """Tokens that end an answer: first the one that ends a turn of the chat template, then those of the model."""
    if template is None:
        return tokenizer.eos_ids
    rendered = template.encode(SMALLEST)
    said = [token for token, target in zip(rendered.ids, rendered.targets, strict=True) if target]
    controls = {*tokenizer.controls.values(), *tokenizer.eos_ids}
    last = next((token for token in reversed(said) if token in controls), None)
    return tuple(dict.fromkeys((*(() if last is None else (last,)), *tokenizer.eos_ids)))
