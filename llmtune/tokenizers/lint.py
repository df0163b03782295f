"""What a training row looks like, decoded, with its targets marked; and what is wrong with it.

    <s>[INST] 2+2? [/INST]⟦ 4</s>⟧

A run shows its first row like this before the first step: most mistakes in templates can be seen, and some can be named.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from llmtune.tokenizers.conversation import Rendered
from llmtune.tokenizers.protocol import Tokenizer


def marked(tokenizer: Tokenizer, rendered: Rendered, *, longest: int | None = None) -> str:
    """The text with control tokens spelled and targets in ⟦ ⟧; the middle is left out where it is longer than `longest`."""
    names = {token: name for name, token in tokenizer.controls.items()}
    parts = []
    for target, run in groupby(zip(rendered.ids, rendered.targets, strict=True), key=lambda pair: pair[1]):
        text = "".join(_spelled(tokenizer, [token for token, _ in run], names))
        parts.append(f"⟦{text}⟧" if target else text)
    shown = "".join(parts)
    if longest is None or len(shown) <= longest:
        return shown
    half = longest // 2
    return f"{shown[:half]} ... {len(shown) - 2 * half} characters ... {shown[-half:]}"


def complaints(tokenizer: Tokenizer, rendered: Rendered) -> list[str]:
    """What is probably a mistake in a row, each in a line; [] where nothing strikes."""
    ids, targets = rendered.ids, rendered.targets
    names = {token: name for name, token in tokenizer.controls.items()}
    found = []
    bos = ids.count(tokenizer.bos_id) if tokenizer.bos_id is not None else 0
    if bos > 1 and tokenizer.bos_id not in tokenizer.eos_ids:
        found.append(
            f"{bos} BOS tokens ({names.get(ids[0], ids[0])}): the template writes one and something else another"
        )
    if bos == 0 and tokenizer.add_bos:
        found.append("no BOS token, where this tokenizer puts one before a text: the template has no bos_token")
    if not any(targets):
        found.append("no token is a target: there is nothing to learn from this row")
    elif not any(target and token in names for token, target in zip(ids, targets, strict=True)):
        found.append("no target ends a turn (EOS or the like): the model would not learn to stop")
    plain = [token for token in ids if token not in names]
    spelled = sorted({name for name in names.values() if len(name) > 2 and name in tokenizer.decode(plain)})
    if spelled:
        found.append(
            f"{spelled[0]} stands in it as text: contents spell it, which is harmless, or they hold a rendered template"
        )
    return found


def _spelled(tokenizer: Tokenizer, ids: Sequence[int], names: dict[int, str]) -> Iterator[str]:
    for name, run in groupby(ids, key=names.get):
        run = list(run)
        yield tokenizer.decode(run) if name is None else name * len(run)
