"""A rendered conversation as text that a golden table can hold: control tokens spelled, targets in ⟦ ⟧."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from llmtune.tokenizers.conversation import Rendered
from llmtune.tokenizers.protocol import Tokenizer


def marked(tokenizer: Tokenizer, rendered: Rendered) -> str:
    """The text with control tokens spelled and targets in ⟦ ⟧."""
    names = {token: name for name, token in tokenizer.controls.items()}
    parts = []
    for target, run in groupby(zip(rendered.ids, rendered.targets, strict=True), key=lambda pair: pair[1]):
        text = "".join(_spelled(tokenizer, [token for token, _ in run], names))
        parts.append(f"⟦{text}⟧" if target else text)
    return "".join(parts)


def _spelled(tokenizer: Tokenizer, ids: Sequence[int], names: dict[int, str]) -> Iterator[str]:
    for name, run in groupby(ids, key=names.get):
        run = list(run)
        yield tokenizer.decode(run) if name is None else name * len(run)
