"""Which chat template a model gets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from llmtune.errors import LlmtuneConfigError
from llmtune.tokenizers.conversation import ChatTemplate
from llmtune.tokenizers.llama_chat import Llama3, Llama31
from llmtune.tokenizers.mistral_chat import MistralV1, MistralV3
from llmtune.tokenizers.protocol import Tokenizer

TEKKEN_SIZE = 100_000  # no sentencepiece vocabulary of Mistral is larger, no Tekken smaller
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip


@final
@dataclass(frozen=True)
class BuiltIn:
    """What makes a template of a tokenizer, and the control tokens that it needs."""

    make: Callable[[Tokenizer], ChatTemplate]
    needs: tuple[str, ...]


BUILT_IN = {
    "llama3": BuiltIn(Llama3, LLAMA),
    "llama3.1": BuiltIn(Llama31, LLAMA),
    "llama3.2": BuiltIn(lambda tokenizer: Llama31(tokenizer, "llama3.2"), LLAMA),
    "mistral-v1": BuiltIn(MistralV1, ("<s>", "</s>")),
    "mistral-v3": BuiltIn(MistralV3, MISTRAL),
    "mistral-tekken": BuiltIn(lambda tokenizer: MistralV3(tokenizer, "mistral-tekken"), MISTRAL),
}


def load_chat_template(directory: Path, tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate | None:
    """The chat template of a model, a built-in one by name, or that of a .jinja file.

    Without a choice, what the vocabulary reveals; None where it reveals nothing.
    """
    name = _revealed(tokenizer) if choice is None else choice
    if name is None:
        return None
    if name not in BUILT_IN:
        raise LlmtuneConfigError(f"chat template {name}: no such template; there are {', '.join(BUILT_IN)}")
    return _built_in(directory, tokenizer, name)


def _built_in(directory: Path, tokenizer: Tokenizer, name: str) -> ChatTemplate:
    missing = [token for token in BUILT_IN[name].needs if token not in tokenizer.controls]
    if missing:
        raise LlmtuneConfigError(
            f"chat template {name}: the tokenizer of {directory} has no {missing[0]}; they do not belong together"
        )
    return BUILT_IN[name].make(tokenizer)


def _revealed(tokenizer: Tokenizer) -> str | None:
    """Mistral v1 has no control tokens that would tell it from Llama 2."""
    has = tokenizer.controls.keys()
    if has >= set(LLAMA):
        return "llama3.1" if "<|python_tag|>" in has else "llama3"
    if has >= set(MISTRAL):
        return "mistral-tekken" if tokenizer.vocab_size > TEKKEN_SIZE else "mistral-v3"
    return None
