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
        return self.encode_batch([text], bos=bos, allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = True, allow_special: bool = False) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        for text in texts:
            require_characters(text)
        rows = [self._with_controls(text) for text in texts] if allow_special else self.model.encode(list(texts))
        return [[self.bos_id, *ids] for ids in rows] if bos and self.bos_id is not None else rows

    def encode_spans(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Tokenizer.encode_spans`."""
        require_characters(text)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        begin = 0
        for piece in self._pieces(text) if allow_special else [text]:
            if allow_special and piece in self.controls:
                found = [(self.controls[piece], (0, len(piece)))]
            else:
                mapping = self.model.encode(piece, return_type="offset_mapping")
                found = list(zip(mapping["ids"], _filled(mapping["offsets"]), strict=True))
            ids += [i for i, _ in found]
            spans += [(begin + b, begin + e) for _, (b, e) in found]
            begin += len(piece)
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self.model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def _with_controls(self, text: str) -> list[int]:
        encoded = ([self.controls[p]] if p in self.controls else self.model.encode(p) for p in self._pieces(text))
        return [token for ids in encoded for token in ids]

    def _pieces(self, text: str) -> list[str]:
        """The text cut at the spellings of control tokens, the longest first."""
        if not self.controls:
            return [text]
        longest_first = sorted(self.controls, key=len, reverse=True)
        return [p for p in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if p]


def _filled(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The library gives a character's last byte its span, empty ones to its other bytes and to a blank put first."""
    filled, end = list(spans), 0
    for at in range(len(filled) - 1, -1, -1):
        end = filled[at][1] if filled[at][0] < filled[at][1] else max(end, filled[at][1])
        filled[at] = (filled[at][0], end)
    return filled


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
