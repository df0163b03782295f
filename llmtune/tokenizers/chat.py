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
from llmtune.tokenizers.llama_chat import DATES, WITH_TOOLS, write_llama3, write_llama31
from llmtune.tokenizers.llama_jinja import LLAMA3, with_tools
from llmtune.tokenizers.mistral_chat import write_v1, write_v3
from llmtune.tokenizers.mistral_jinja import v1, v3
from llmtune.tokenizers.plain_chat import PlainChat, Write
from llmtune.tokenizers.protocol import Tokenizer
from llmtune.tokenizers.settings import read_object

TEMPLATE = "chat_template.jinja"
TEKKEN_SIZE = 100_000  # no sentencepiece vocabulary of Mistral is larger, no Tekken smaller
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip


@final
@dataclass(frozen=True)
class BuiltIn:
    """What writes a conversation, the same in Jinja for a tokenizer, and the control tokens that both need."""

    write: Write
    jinja: Callable[[Tokenizer], str]
    needs: tuple[str, ...]


LLAMA31 = BuiltIn(write_llama31, lambda tokenizer: with_tools(DATES, WITH_TOOLS), LLAMA)
BUILT_IN = {
    "llama3": BuiltIn(write_llama3, lambda tokenizer: LLAMA3, LLAMA),
    "llama3.1": LLAMA31,
    "llama3.2": LLAMA31,
    "mistral-v1": BuiltIn(write_v1, v1, ("<s>", "</s>")),
    "mistral-v3": BuiltIn(write_v3, v3, MISTRAL),
    "mistral-tekken": BuiltIn(write_v3, v3, MISTRAL),
}


def load_chat_template(directory: Path, tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate | None:
    """The chat template of a model directory.

    `choice` None: the model's own (`chat_template.jinja`, else `chat_template` of tokenizer_config.json), which goes before a
    built-in one, because it is what the model was trained with, where a built-in is what its family is (its own may be a
    built-in one that `write_chat_template` put there); else the built-in one that the vocabulary reveals, else None.
    Otherwise the name of a built-in (`BUILT_IN`), or the path of a .jinja file.

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


def says_template(directory: Path) -> bool:
    """Whether a chat template lies there, in its own file or in tokenizer_config.json."""
    file, settings = directory / TEMPLATE, directory / "tokenizer_config.json"
    return file.is_file() or read_object(settings).get("chat_template") is not None


def write_chat_template(directory: Path, template: ChatTemplate | None) -> None:
    """Put a template where other programs look for it; nothing where the directory says the same already.

    Two templates in one (see `ChatTemplate.jinja`) stay where they are.
    """
    settings = directory / "tokenizer_config.json"
    own = read_object(settings)
    if template is None or template.jinja is None:
        return
    file = directory / TEMPLATE
    if own.get("chat_template") != template.jinja or file.is_file():
        file.write_text(template.jinja, encoding="utf-8")
        if own.pop("chat_template", None) is not None:  # else there would be two
            settings.write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _own(directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    file, settings = directory / TEMPLATE, directory / "tokenizer_config.json"
    if file.is_file():
        source = _read(file)
        ours = _written_by_us(tokenizer, source)
        return (
            _jinja(directory, tokenizer, source, file.name) if ours is None else _built_in(directory, tokenizer, ours)
        )
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
    own = BUILT_IN[name]
    missing = [token for token in own.needs if token not in tokenizer.controls]
    if missing:
        raise LlmtuneConfigError(
            f"chat template {name}: the tokenizer of {directory} has no {missing[0]}; they do not belong together"
        )
    return PlainChat(name, tokenizer, own.write, own.jinja(tokenizer))


def _written_by_us(tokenizer: Tokenizer, source: str) -> str | None:
    """The name of the built-in template that this text of Jinja says word for word: what an export of ours carries."""
    fitting = (name for name, own in BUILT_IN.items() if tokenizer.controls.keys() >= set(own.needs))
    return next((name for name in fitting if BUILT_IN[name].jinja(tokenizer) == source), None)


def _revealed(tokenizer: Tokenizer) -> str | None:
    """Mistral v1 has no control tokens that would tell it from Llama 2."""
    has = tokenizer.controls.keys()
    if has >= set(LLAMA):
        return "llama3.1" if "<|python_tag|>" in has else "llama3"
    if has >= set(MISTRAL):
        return "mistral-tekken" if tokenizer.vocab_size > TEKKEN_SIZE else "mistral-v3"
    return None
