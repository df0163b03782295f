"""Many drafts -> examples at once: texts go to the tokenizer as one batch, masks are made on flat arrays."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.data.example import IGNORED, Cut, Example
from llmtune.data.invalid import BadRow
from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import Tokenizer
from llmtune.tokenizers.conversation import ChatTemplate, Conversation


@dataclass(frozen=True, slots=True)
class Parts:
    """Texts of a row that are tokenised apart; each is a target or is not. BOS precedes them, EOS follows a target."""

    texts: tuple[str, ...]
    targets: tuple[bool, ...]
    cut: Cut = "end"

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class Encoder:
    """The tokenising of one format; `pretrain`: everything but the first token is a target."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    pretrain: bool

    def encode(self, drafts: Sequence[tuple[Example | Parts | Conversation, str]]) -> Iterator[Example | BadRow]:
        """An example for each draft, or what is wrong with it, in order."""
        parts = self._parts([draft for draft in drafts if isinstance(draft[0], Parts)])
        for draft, where in drafts:
            if isinstance(draft, Parts):
                yield next(parts)
            elif isinstance(draft, Conversation):
                yield self._conversation(draft, where)
            else:
                yield draft

    def _conversation(self, conversation: Conversation, where: str) -> Example | BadRow:
        assert self.template is not None
        try:
            rendered = self.template.encode(conversation)
        except LlmtuneDataError as error:
            return BadRow(where, str(error), "refused by the chat template")
        ids = np.array(rendered.ids, np.int32)
        labels = np.where(rendered.targets, ids, IGNORED).astype(np.int32)
        if self.pretrain:
            labels[1:] = ids[1:]
        return Example(ids, labels, where, "end" if self.pretrain else "turn")

    def _parts(self, drafts: Sequence[tuple[Parts | Example | Conversation, str]]) -> Iterator[Example]:
        if not drafts:
            return
        tokenizer = self.tokenizer
        assert tokenizer is not None
        rows = [(draft, where) for draft, where in drafts if isinstance(draft, Parts)]
        encoded = iter(_encode_all(tokenizer, [text for draft, _ in rows for text in draft.texts]))
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        eos = list(tokenizer.eos_ids[:1])
        pieces: list[list[int]] = []
        kept: list[bool] = []
        lengths: list[int] = []
        for draft, _ in rows:
            own = [bos, *itertools.islice(encoded, len(draft.texts))]
            targets = [False, *(self.pretrain or target for target in draft.targets)]
            if own[-1] or draft.cut == "pieces":
                own.append(eos)
                targets.append(True)
            pieces += own
            kept += targets
            lengths.append(sum(map(len, own)))
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, int(sizes.sum()))
        labels = np.where(np.repeat(kept, sizes), ids, np.int32(IGNORED))
        at = 0
        for (draft, where), length in zip(rows, lengths, strict=True):
            span = slice(at, at + length)
            yield Example(ids[span], labels[span], where, draft.cut)
            at += length


def _encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(text, bos=False) for text in texts]
