"""Ids of a text of which only parts may spell control tokens, and which of them are targets.

Where no control token reaches into a part that may not spell one, the ids are those of the whole text, as the reference
gives them: neighbours merge across the edges of the parts. Where one would, the text is cut at the control tokens that
are allowed, and what lies between is tokenised without any.
"""

from collections.abc import Iterable, Sequence

from llmtune.tokenizers.conversation import Rendered
from llmtune.tokenizers.protocol import Tokenizer

Span = tuple[int, int]


def tokenised(tokenizer: Tokenizer, text: str, own: Sequence[Span], targets: Sequence[Span]) -> Rendered:
    """`own` are the parts that may spell control tokens; a token is a target where it shares a character with `targets`."""
    ids, spans = tokenizer.encode_spans(text, allow_special=True)
    known = set(tokenizer.controls.values())
    covered = _covered(len(text), own)
    if any(i in known and not all(covered[b:e]) for i, (b, e) in zip(ids, spans, strict=True)):
        ids, spans = _apart(tokenizer, text, covered)
    spoken = _covered(len(text), targets)
    return Rendered(list(ids), [any(spoken[b : max(e, b + 1)]) for b, e in spans])


def _apart(tokenizer: Tokenizer, text: str, covered: bytearray) -> tuple[list[int], list[Span]]:
    known = set(tokenizer.controls.values())
    harmless = "".join(c if mine else "x" for c, mine in zip(text, covered, strict=True))
    found, where = tokenizer.encode_spans(harmless, allow_special=True)
    cuts = [(i, b, e) for i, (b, e) in zip(found, where, strict=True) if i in known and all(covered[b:e])]
    ids: list[int] = []
    spans: list[Span] = []
    at = 0
    for control, begin, end in [*cuts, (None, len(text), len(text))]:
        between, inner = tokenizer.encode_spans(text[at:begin])
        ids += between
        spans += [(at + b, at + e) for b, e in inner]
        if control is not None:
            ids.append(control)
            spans.append((begin, end))
        at = end
    return ids, spans


def _covered(length: int, spans: Iterable[Span]) -> bytearray:
    """One for every character in one of the spans."""
    covered = bytearray(length)
    for begin, end in spans:
        covered[begin:end] = b"\x01" * (end - begin)
    return covered
