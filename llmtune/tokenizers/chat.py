"""Which chat template a model gets."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.tokenizers.conversation import ChatTemplate
from llmtune.tokenizers.jinja_chat import ByTools, JinjaChat
from llmtune.tokenizers.jinja_process import TemplateProcess
from llmtune.tokenizers.llama_chat import Llama3, Llama31
from llmtune.tokenizers.mistral_chat import MistralV1, MistralV3
from llmtune.tokenizers.protocol import Tokenizer
from llmtune.tokenizers.settings import read_object

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
    """The chat template of a model directory.

    `choice` None: the model's own (`chat_template.jinja`, else `chat_template` of tokenizer_config.json), which goes before a
    built-in one, because it is what the model was trained with, where a built-in is what its family is; else the built-in
    one that the vocabulary reveals, else None. Otherwise the name of a built-in (`BUILT_IN`), or the path of a .jinja file.

    Raises LlmtuneFormatError for a template that does not compile, LlmtuneConfigError for a choice that there is not or that
    does not fit the tokenizer.
    """
    if choice is None:
        own = _own(directory, tokenizer)
        revealed = _revealed(tokenizer) if own is None else None
        return own if revealed is None else _built_in(directory, tokenizer, revealed)
    if choice in BUILT_IN:
        return _built_in(directory, tokenizer, choice)
    if not choice.endswith(".jinja") or not Path(choice).is_file():
        raise LlmtuneConfigError(
            f"chat template {choice}: neither a built-in one ({', '.join(BUILT_IN)}) nor a .jinja file that exists"
        )
    return _jinja(directory, tokenizer, _read(Path(choice)), choice)


def write_chat_template(directory: Path, template: ChatTemplate | None) -> None:
    """Put a template where other programs look for it; nothing where the directory says the same already.

    One that is not told in Jinja stays with llmtune (see `ChatTemplate.jinja`).
    """
    settings = directory / "tokenizer_config.json"
    own = read_object(settings)
    if template is None or template.jinja is None:
        return
    file = directory / "chat_template.jinja"
    if own.get("chat_template") != template.jinja or file.is_file():
        file.write_text(template.jinja, encoding="utf-8")
        if own.pop("chat_template", None) is not None:  # else there would be two
            settings.write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _own(directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    file, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        return _jinja(directory, tokenizer, _read(file), file.name)
    given = read_object(settings).get("chat_template")
    if given is None:
        return None
    if isinstance(given, str):
        return _jinja(directory, tokenizer, given, settings.name)
    try:  # a list of named templates, of which transformers takes these two
        named = {str(entry["name"]): entry["template"] for entry in given}
        sources = [named["default"], named.get("tool_use", named["default"])]
        if not all(isinstance(source, str) for source in sources):
            raise TypeError
    except (TypeError, KeyError):
        raise LlmtuneFormatError(
            f"{settings}: chat_template must be a text, or a list of named ones with a default"
        ) from None
    plain, with_tools = (_jinja(directory, tokenizer, source, settings.name) for source in sources)
    return ByTools(plain, with_tools)


def _jinja(directory: Path, tokenizer: Tokenizer, source: str, name: str) -> JinjaChat:
    process = TemplateProcess(source, name)
    process.check()
    spelled = {token: name for name, token in tokenizer.controls.items()}
    found = {"bos_token": spelled.get(tokenizer.bos_id)} if tokenizer.bos_id is not None else {}
    found |= {"eos_token": spelled.get(tokenizer.eos_ids[0])} if tokenizer.eos_ids else {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_object(directory / file).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return JinjaChat(name, tokenizer, process, {key: value for key, value in found.items() if value is not None})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LlmtuneFormatError(f"{path}: not a text file in UTF-8 ({error})") from None


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
