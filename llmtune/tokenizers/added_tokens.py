"""Tokens that a run adds to a tokenizer.json.

    words      vocabulary: their spelling is this one token in whatever text, and is shown when decoded
    controls   control tokens: only a template's own text makes them (`allow_special`), never what a row contains

Their ids follow the tokenizer's, words first. In a tokenizer.json they differ as `special: false` and `special: true`, so
that transformers tells them apart in the same way.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.tokenizers.settings import read_object

WORDS, CONTROLS = "data.add_tokens", "data.add_special_tokens"
AS_IT_IS = "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class AddedTokens:
    """In the order of their ids."""

    words: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.words) + len(self.controls)

    @property
    def key(self) -> str:
        """The configuration key that the first of them comes from."""
        return WORDS if self.words else CONTROLS

    def entries(self) -> Iterator[tuple[str, tokenizers.AddedToken]]:
        """(configuration key, token) of each; matched exactly as spelt, before any normalisation."""
        for key, names in ((WORDS, self.words), (CONTROLS, self.controls)):
            for name in names:
                yield key, tokenizers.AddedToken(name, normalized=False, special=key == CONTROLS)


NONE_ADDED = AddedTokens()


def add_tokens(reader: tokenizers.Tokenizer, added: AddedTokens) -> None:
    """Put them into a tokenizer; refuses one that it has already, or that it would give no new id."""
    if not added:
        return
    known = reader.get_added_tokens_decoder()
    following = max(reader.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    for key, token in added.entries():
        taken = reader.token_to_id(token.content)
        if taken is not None:
            kind = "a control token" if taken in known and known[taken].special else "in the vocabulary"
            raise LlmtuneConfigError(f"{key}: {token.content!r} is {kind} already (id {taken}); leave it out")
        reader.add_special_tokens([token]) if token.special else reader.add_tokens([token])
        if reader.token_to_id(token.content) != following:
            raise LlmtuneFormatError(f"{key}: the tokenizer's ids have gaps; {token.content!r} gets no id of its own")
        following += 1


def write_added_tokens(directory: Path, added: AddedTokens) -> None:
    """Bring the tokenizer files of a directory up to date: tokenizer.json, and where they list tokens its neighbours.

    tokenizer_config.json then asks for the class that takes tokenizer.json as it is: LlamaTokenizer of transformers 5 rebuilds
    the treatment of spaces, and gives other ids to the text behind an added token than the run trained on.
    """
    path = directory / "tokenizer.json"
    reader = tokenizers.Tokenizer.from_file(str(path))
    add_tokens(reader, added)
    reader.save(str(path), pretty=True)
    ids = {token.content: reader.token_to_id(token.content) for _, token in added.entries()}
    own = read_object(directory / "tokenizer_config.json")
    if own:
        listed = {str(ids[token.content]): _described(token) for _, token in added.entries()}
        own["tokenizer_class"] = AS_IT_IS
        own["added_tokens_decoder"] = {**own.get("added_tokens_decoder", {}), **listed}
        _write(directory / "tokenizer_config.json", own)
    beside = directory / "added_tokens.json"
    if beside.is_file() or (directory / "tokenizer.model").is_file():  # converters read it beside a sentencepiece model
        _write(beside, read_object(beside) | ids)


def _described(token: tokenizers.AddedToken) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": token.content, **plain, "special": token.special}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
