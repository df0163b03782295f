"""`tokenizer.json`, read by the tokenizers library."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import tokenizers

from llmtune.errors import LlmtuneFormatError
from llmtune.tokenizers.added_tokens import NONE_ADDED, AddedTokens, add_tokens
from llmtune.tokenizers.protocol import require_characters
from llmtune.tokenizers.settings import ending_ids, read_settings


@final
@dataclass(frozen=True)
class TokenizerJson:
    """Two copies of one tokenizer: `plain` never parses control tokens out of text, `special` (read when first needed) does."""

    plain: tokenizers.Tokenizer
    read_special: Callable[[], tokenizers.Tokenizer]
    controls: dict[str, int]
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool

    @functools.cached_property
    def special(self) -> tokenizers.Tokenizer:
        """The copy that parses control tokens; a large vocabulary takes a third of a second to read."""
        return self.read_special()

    def encode(self, text: str, *, bos: bool = True, allow_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        ids, _ = self.encode_spans(text, allow_special=allow_special)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = True, allow_special: bool = False) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        for text in texts:
            require_characters(text)
        reader = self.special if allow_special else self.plain
        first = [self.bos_id] if bos and self.bos_id is not None else []
        return [first + e.ids for e in reader.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Tokenizer.encode_spans`."""
        require_characters(text)
        encoding = (self.special if allow_special else self.plain).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self.plain.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)


def read_tokenizer_json(directory: Path, added: AddedTokens = NONE_ADDED) -> TokenizerJson:
    """The tokenizer of a directory that has a tokenizer.json, with a run's own tokens added."""
    path = directory / "tokenizer.json"
    plain = _read(path, added, encode_special_tokens=True)
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = read_settings(directory)
    bos_id = plain.token_to_id(settings.bos) if settings.bos is not None else settings.bos_id
    ids = plain.get_vocab(with_added_tokens=True).values()
    return TokenizerJson(
        plain,
        functools.partial(_read, path, added, encode_special_tokens=False),
        {token.content: index for index, token in plain.get_added_tokens_decoder().items() if token.special},
        vocab_size=max(ids, default=-1) + 1,
        bos_id=bos_id,
        eos_ids=ending_ids(settings, plain.token_to_id, None),
        add_bos=_adds_bos(content, settings.bos) if settings.add_bos is None else bool(settings.add_bos),
    )


def _read(path: Path, added: AddedTokens, *, encode_special_tokens: bool) -> tokenizers.Tokenizer:
    try:
        reader = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions of many kinds
        raise LlmtuneFormatError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    reader.encode_special_tokens = encode_special_tokens
    reader.no_truncation()
    reader.no_padding()
    add_tokens(reader, added)
    return reader


def _adds_bos(content: dict, bos: str | None) -> bool:
    """Whether the post-processor's template begins with the BOS token."""
    processor = content.get("post_processor") or {}
    steps = [processor, *processor.get("processors", [])]
    templates = [step.get("single", []) for step in steps if step.get("type") == "TemplateProcessing"]
    return any(t and bos is not None and t[0].get("SpecialToken", {}).get("id") == bos for t in templates)
