"""What every tokenizer does, whichever file it was read from."""

from collections.abc import Sequence
from typing import Protocol


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

    def encode(self, text: str, *, bos: bool = True, allow_special: bool = False) -> list[int]:
        """ids of a text; `bos` puts exactly one BOS first, `allow_special` lets the spelling of a control token be one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        ...
