"""Many drafts -> examples at once: texts go to the tokenizer as one batch, masks are made on flat arrays."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.data.example import IGNORED, Cut, Example
from llmtune.data.invalid import BadRow
from llmtune.data.spans import Where
from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import Tokenizer
from llmtune.tokenizers.conversation import ChatTemplate, Conversation


@dataclass(frozen=True, slots=True)
class Parts:
    """Texts of a row that are tokenised apart; each is a target or is not. BOS precedes them, EOS follows a target."""

    texts: tuple[str, ...]
    targets: tuple[bool, ...]
    cut: Cut = "end"


Draft = Example | Parts | Conversation


def size_of(draft: Draft) -> int:
    """Characters of a draft, so that batches stay small in memory; ids that are there already weigh nothing."""
    if isinstance(draft, Parts):
        return sum(map(len, draft.texts))
    return sum(len(turn.content) for turn in draft.messages) if isinstance(draft, Conversation) else 0


@dataclass(frozen=True)
class Encoder:
    """The tokenising of one format; `pretrain`: everything but the first token is a target."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    pretrain: bool

    def encode(self, drafts: Sequence[tuple[Draft, Where]]) -> Iterator[Example | BadRow]:
        """An example for each draft, or what is wrong with it, in order."""
        parts = self._parts([(draft, where) for draft, where in drafts if isinstance(draft, Parts)])
        turns = self._turns([(draft, where) for draft, where in drafts if isinstance(draft, Conversation)])
        for draft, _ in drafts:
            if isinstance(draft, Example):
                yield draft
            else:
                yield next(parts if isinstance(draft, Parts) else turns)

    def _turns(self, drafts: Sequence[tuple[Conversation, Where]]) -> Iterator[Example | BadRow]:
        if not drafts:
            return
        assert self.template is not None
        rendered = self.template.encode_batch([conversation for conversation, _ in drafts])
        for found, (_, where) in zip(rendered, drafts, strict=True):
            if isinstance(found, LlmtuneDataError):
                yield BadRow(where, str(found), "refused by the chat template")
                continue
            ids = np.array(found.ids, np.int32)
            labels = np.where(np.array(found.targets, bool), ids, np.int32(IGNORED))
            if self.pretrain:
                labels[1:] = ids[1:]
            yield Example(ids, labels, where, "end" if self.pretrain else "turn")

    def _parts(self, rows: Sequence[tuple[Parts, Where]]) -> Iterator[Example]:
        if not rows:
            return
        tokenizer = self.tokenizer
        assert tokenizer is not None
        encoded = iter(tokenizer.encode_batch([text for draft, _ in rows for text in draft.texts], bos=False))
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
