"""A sentencepiece `.model`, read by the sentencepiece library."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import sentencepiece

from llmtune.errors import LlmtuneFormatError
from llmtune.tokenizers.protocol import require_characters
from llmtune.tokenizers.settings import ending_ids, read_settings


@final
@dataclass(frozen=True)
class SentencePiece:
    """sentencepiece never reads control tokens out of text; `allow_special` does it here, by their spelling."""

    model: sentencepiece.SentencePieceProcessor
    controls: dict[str, int]
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool

    def encode(self, text: str, *, bos: bool = True, allow_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        require_characters(text)
        ids = self._with_controls(text) if allow_special else self.model.encode(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self.model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def _with_controls(self, text: str) -> list[int]:
        if not self.controls:
            return self.model.encode(text)
        longest_first = sorted(self.controls, key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        encoded = ([self.controls[p]] if p in self.controls else self.model.encode(p) for p in pieces if p)
        return [token for ids in encoded for token in ids]


def read_sentencepiece(path: Path) -> SentencePiece:
    """The tokenizer of one `.model` file; settings are read beside it."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # the library raises RuntimeError, OSError and more
        raise LlmtuneFormatError(f"{path}: not a sentencepiece model ({' '.join(str(error).split())[:200]})") from None
    size = model.get_piece_size()
    controls = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    settings = read_settings(path.parent)

    def id_of(piece: str) -> int | None:
        return model.piece_to_id(piece) if model.piece_to_id(piece) != model.unk_id() else None

    bos = settings.bos_id if model.bos_id() < 0 else model.bos_id()
    return SentencePiece(
        model,
        controls,
        vocab_size=size,
        bos_id=bos,
        eos_ids=ending_ids(settings, id_of, None if model.eos_id() < 0 else model.eos_id()),
        add_bos=bos is not None if settings.add_bos is None else bool(settings.add_bos),
    )
