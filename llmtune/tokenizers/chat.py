"""Which chat template a model gets."""

from collections.abc import Callable
from pathlib import Path

from llmtune.errors import LlmtuneConfigError
from llmtune.tokenizers.conversation import ChatTemplate
from llmtune.tokenizers.llama_chat import Llama3, Llama31
from llmtune.tokenizers.protocol import Tokenizer

BUILT_IN: dict[str, tuple[Callable[[Tokenizer], ChatTemplate], tuple[str, ...]]] = {
    # name: what makes it, the control tokens that it needs
    "llama3": (Llama3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")),
    "llama3.1": (Llama31, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")),
    "llama3.2": (lambda tokenizer: Llama31(tokenizer, "llama3.2"), ("<|start_header_id|>", "<|eot_id|>")),
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
    make, needed = BUILT_IN[name]
    missing = [token for token in needed if token not in tokenizer.controls]
    if missing:
        raise LlmtuneConfigError(
            f"chat template {name}: the tokenizer of {directory} has no {missing[0]}; they do not belong together"
        )
    return make(tokenizer)


def _revealed(tokenizer: Tokenizer) -> str | None:
    if "<|start_header_id|>" in tokenizer.controls:
        return "llama3.1" if "<|python_tag|>" in tokenizer.controls else "llama3"
    return None
