"""What the first row looks like to the model: decoded, its targets marked; and what is odd about it.

    first row: <|begin_of_text|>...<|end_header_id|>\\n\\n[[Hello!<|eot_id|>]]
    warning: no target of the first 64 rows is an end-of-text token; the model will not learn to stop

A look at this line before training starts finds most mistakes of templates and masks that otherwise cost a run.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.data.dataset import Dataset
from llmtune.data.example import IGNORED
from llmtune.tokenizers import Tokenizer
from llmtune.tokenizers.conversation import ChatTemplate
from llmtune.tokenizers.turns import SMALLEST, chat_prompt, end_ids

SHOWN, LOOKED_AT = 1200, 64  # characters of the row; rows
MARKER = re.compile(r"<\|[A-Za-z_]+\|>|\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS)\]|</?s>")


@dataclass(frozen=True)
class Look:
    """`text`: the first row, targets in [[ ]]; "" without a tokenizer."""

    text: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """To be printed before training begins."""
        shown = (f"first row, targets in [[ ]]: {self.text}",) if self.text else ()
        return (*shown, *(f"warning: {warning}" for warning in self.warnings))


def look_at(dataset: Dataset, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> Look:
    """The first row as the model gets it. Nothing here changes a row: warnings are all that it does."""
    if tokenizer is None:
        return Look()
    ids, labels = dataset.example(0)
    warnings = [*_about_ends(dataset, tokenizer, template), *_about_template(tokenizer, template)]
    return Look(_shorten(spell_row(tokenizer, ids, labels != IGNORED)), tuple(warnings))


def spell_row(tokenizer: Tokenizer, ids: np.ndarray, targets: np.ndarray) -> str:
    """Text of ids with control tokens spelled out and runs of targets in [[ ]]; line breaks as \\n."""
    names = {number: spelling for spelling, number in tokenizer.controls.items()}
    pieces: list[tuple[bool, str]] = []
    for control, run in itertools.groupby(
        zip(ids.tolist(), targets.tolist(), strict=True), lambda own: own[0] in names
    ):
        pairs = list(run)
        pieces += [(target, names[number]) for number, target in pairs] if control else _spell(tokenizer, pairs)
    parts = []
    for target, run in itertools.groupby(pieces, lambda own: own[0]):
        text = "".join(piece for _, piece in run)
        parts.append(f"[[{text}]]" if target else text)
    return "".join(parts).replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")


def _spell(tokenizer: Tokenizer, pairs: Sequence[tuple[int, bool]]) -> Iterator[tuple[bool, str]]:
    """Runs of equal targets, each as what it adds to the text before it: decoded alone, it would lose its leading blank."""
    done, ids = "", []
    for target, run in itertools.groupby(pairs, lambda own: own[1]):
        own = [number for number, _ in run]
        ids += own
        whole = tokenizer.decode(ids)
        yield target, whole[len(done) :] if whole.startswith(done) else tokenizer.decode(own)
        done = whole


def _about_ends(dataset: Dataset, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    warnings, bos = [], tokenizer.bos_id
    ids, _ = dataset.example(0)
    if bos is not None and len(ids) > 1 and ids[0] == bos == ids[1]:
        warnings.append(
            "the first row begins with BOS twice; BOS is put there by llmtune, remove it from the template or the data"
        )
    elif bos is not None and tokenizer.add_bos and ids[0] != bos:
        warnings.append("the first row does not begin with BOS, which this model's tokenizer puts before every text")
    ends = end_ids(tokenizer, template)
    rows = range(min(LOOKED_AT, len(dataset)))
    if not any(np.isin(dataset.example(row)[1], ends).any() for row in rows):
        warnings.append(
            f"no target of the first {len(rows)} rows is an end-of-text token; the model will not learn to stop"
        )
    return warnings


def _about_template(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    """Markers that a template writes and the tokenizer reads as plain text, and an end of turn that generation does not know."""
    if template is None:
        return []
    warnings = []
    rendered = template.encode(SMALLEST)
    controls = set(tokenizer.controls.values())
    plain = tokenizer.decode([token for token in rendered.ids if token not in controls])
    unknown = [marker for marker in dict.fromkeys(MARKER.findall(plain)) if not marker.endswith("INST]")]
    if unknown:
        warnings.append(
            f"the chat template {template.name} writes {', '.join(unknown)}, which this tokenizer reads as plain text; "
            "template and tokenizer may not belong together"
        )
    if not any(rendered.targets):
        warnings.append(f"the chat template {template.name} marks nothing as said by the assistant")
    prompt = chat_prompt(template, SMALLEST.messages[0].content)
    if rendered.ids[: len(prompt)] != prompt:
        warnings.append(
            f"the chat template {template.name} does not begin an answer with the tokens of its generation prompt: the model "
            "is asked in other tokens than it learns from (a blank or line break at the end of the prompt is the usual reason)"
        )
    first = end_ids(tokenizer, template)[:1]
    if not set(first) <= set(tokenizer.eos_ids):
        warnings.append(
            f"the chat template {template.name} ends turns with id {first[0]}, which is not among the model's eos ids "
            f"{list(tokenizer.eos_ids)}; generation_config.json of the export will name it, that of a base under an adapter "
            "does not"
        )
    return warnings


def _shorten(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} ...({len(text) - 2 * half:,} characters)... {text[-half:]}"
