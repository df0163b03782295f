"""What every tokenizer does, whichever file it was read from."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from llmtune.errors import LlmtuneDataError


class Tokenizer(Protocol):
    """Text <-> ids. By default text never becomes control tokens, whatever it spells."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end one, the first being the one that training appends."""
        ...

    @property
    def add_bos(self) -> bool:
        """Whether the reference tokenizer puts BOS before a text."""
        ...

    @property
    def controls(self) -> Mapping[str, int]:
        """The control tokens by their spelling: what `allow_special` reads out of a text."""
        ...

    def encode(self, text: str, *, bos: bool = True, allow_special: bool = False) -> list[int]:
        """Ids of a text; `bos` puts exactly one BOS first, `allow_special` lets the spelling of a control token be one."""
        ...

    def encode_batch(self, texts: Sequence[str], *, bos: bool = True, allow_special: bool = False) -> list[list[int]]:
        """`encode` of every text, by the threads of the library, without the interpreter's lock."""
        ...

    def encode_spans(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without BOS, and the characters that each was read from, as [begin, end).

        Tokens that share a character have overlapping spans; a blank that the tokenizer puts first counts to what follows.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens and ids beyond the vocabulary are left out."""
        ...


def require_characters(text: str) -> None:
    """Refuse lone surrogates: JSON can spell them, the tokenizing libraries fail on them in ways of their own."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at, code = error.start, ord(text[error.start])
        raise LlmtuneDataError(
            f"the text holds a lone surrogate (U+{code:04X} at character {at}), which is no character; clean it"
        ) from None
