"""A chat template in Jinja, the model's own or the user's, rendered in a confined process.

The template's own text may spell control tokens; what stands in the conversation never does. `masking` tells which
character is whose, and a control token counts only where each of its characters is the template's.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers.conversation import Conversation, Rendered
from llmtune.tokenizers.draft import inexpressible
from llmtune.tokenizers.jinja_process import Failure, Render, TemplateProcess, Text, job
from llmtune.tokenizers.masking import Masks, aligned, in_real, variables
from llmtune.tokenizers.own_text import tokenised
from llmtune.tokenizers.protocol import Tokenizer

TOGETHER = 64  # conversations in one message to the process
TURNS = 128  # assistant's turns whose beginnings are rendered; a longer conversation's turns begin at their contents
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "</s>")  # of a turn, besides the tokenizer's EOS

Span = tuple[int, int]


@final
@dataclass(frozen=True)
class JinjaChat:
    """`extra` are the template's other variables: `bos_token` and the like."""

    name: str
    tokenizer: Tokenizer
    process: TemplateProcess
    extra: Mapping[str, str]

    @property
    def jinja(self) -> str | None:
        """See `ChatTemplate.jinja`."""
        return self.process.source

    def encode(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """See `ChatTemplate.encode`; whether there is a BOS is the template's affair, as it is in transformers."""
        rendered = self.encode_batch([conversation], add_generation_prompt=add_generation_prompt)[0]
        if isinstance(rendered, LlmtuneDataError):
            raise rendered
        return rendered

    def encode_batch(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[Rendered | LlmtuneDataError]:
        """See `ChatTemplate.encode_batch`."""
        groups = (conversations[i : i + TOGETHER] for i in range(0, len(conversations), TOGETHER))
        return [rendered for group in groups for rendered in self._group(group, add_generation_prompt)]

    def _group(self, group: Sequence[Conversation], prompt: bool) -> Iterator[Rendered | LlmtuneDataError]:
        asked = [self._job(conversation, prompt) for conversation in group]
        answers = iter(self.process.render([one.spelled for one in asked if isinstance(one, _Job)]))
        for one in asked:
            try:
                yield one if isinstance(one, LlmtuneDataError) else self._rendered(one, next(answers))
            except LlmtuneDataError as error:
                yield error

    def _job(self, conversation: Conversation, prompt: bool) -> "_Job | LlmtuneDataError":
        masks = Masks(tuple(self.tokenizer.controls))
        more = {**self.extra, "add_generation_prompt": prompt}
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        try:
            masked = variables(conversation, masks.of_message, masks.of_id, masks.of_tools) | more
            real = variables(conversation, lambda _: str, lambda _: str, str) | more
            starts = tuple(turns[:TURNS])
            spelled = job(Render(masked, starts), Render(real))
        except (TypeError, ValueError, RecursionError) as error:
            why = "is nested too deeply" if isinstance(error, RecursionError) else "holds what is no JSON"
            return LlmtuneDataError(f"chat template {self.name}: the conversation {why}")
        return _Job(conversation, masks, turns, Render(real, starts), spelled)

    def _rendered(self, asked: "_Job", answer: list[Text] | Failure) -> Rendered:
        if isinstance(answer, Failure):
            inexpressible(self.name, answer.why)
        masked, real = answer
        pieces = aligned(masked.text, real.text, asked.masks)
        if pieces is None:
            return self._transformed(asked, masked.text)
        own = [(p.begin, p.end) for p in pieces if p.word is None]
        words = [(p.masked, p.masked + len(p.word), asked.masks.owners[p.word]) for p in pieces if p.word is not None]
        spoken = self._spoken(asked, masked, words)
        return tokenised(self.tokenizer, real.text, own, [(in_real(b, pieces), in_real(e, pieces)) for b, e in spoken])

    def _transformed(self, asked: "_Job", masked: str) -> Rendered:
        """A template that changes contents: accepted where no content spells a control token and it adds none for them."""
        spelling = _either(self.tokenizer.controls)
        found = next((m[0] for text in asked.masks.strings.values() for m in spelling.finditer(text)), None)
        if found is not None:
            inexpressible(
                self.name, f"it changes contents, and one of them spells {found}: safe only where they stay as they are"
            )
        answer = self.process.render([job(asked.real)])[0]
        if isinstance(answer, Failure):
            inexpressible(self.name, answer.why)
        real = answer[0]
        if self._controls(masked) != self._controls(real.text):
            inexpressible(self.name, "it writes other control tokens for these contents than for any others")
        known = [start for start in real.starts if isinstance(start, int)]
        if len(asked.turns) not in (len(real.spans), len(known)):
            inexpressible(self.name, "it changes contents; put {% generation %} around what the assistant says")
        return tokenised(self.tokenizer, real.text, [(0, len(real.text))], self._spoken(asked, real, []))

    def _controls(self, text: str) -> list[int]:
        known = set(self.tokenizer.controls.values())
        return [i for i in self.tokenizer.encode(text, bos=False, allow_special=True) if i in known]

    def _spoken(self, asked: "_Job", text: Text, words: Sequence[tuple[int, int, int | None]]) -> list[Span]:
        """What the assistant says in its trained turns: from where its turn begins to the token that ends it."""
        spans: list[Span] = []
        for number, turn in enumerate(asked.turns):
            mine = [(b, e) for b, e, owner in words if owner == turn]
            block = _block(text, number, len(asked.turns), mine)
            start = _start(asked, text, number, words, mine)
            if block is not None:
                begin, stop = block
            elif start is None and not mine:
                continue  # an empty turn whose beginning is not known
            else:
                begin = mine[0][0] if start is None else start
                stop = max([begin, *(e for _, e in mine)])
            after = [b for b, _, owner in words if owner is not None and owner > turn and b >= stop]
            after += [s for s in text.starts[number + 1 :] if isinstance(s, int) and s >= stop]
            ended = self._end(text.text, begin, stop, min(after, default=len(text.text)), anywhere=block is None)
            if asked.conversation.messages[turn].train:
                spans.append((begin, ended))
        return spans

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        return _either(
            n for n, token in self.tokenizer.controls.items() if n in ENDS or token in self.tokenizer.eos_ids
        )

    def _end(self, text: str, begin: int, stop: int, bound: int, *, anywhere: bool) -> int:
        """The end of the token that ends a turn whose contents end at `stop`; `stop` where there is none."""
        if not anywhere and any(found.end() == stop for found in self._ends.finditer(text, begin, stop)):
            return stop
        found = self._ends.search(text, stop, bound) if anywhere else self._ends.match(text, stop)
        return found.end() if found else stop


@final
@dataclass(frozen=True)
class _Job:
    conversation: Conversation
    masks: Masks
    turns: list[int]
    real: Render
    spelled: str  # the masked rendering and the real one


@final
@dataclass(frozen=True)
class ByTools:
    """A model that has one template for conversations with tools and one for those without."""

    plain: JinjaChat
    with_tools: JinjaChat

    @property
    def name(self) -> str:
        """Of the one without."""
        return self.plain.name

    @property
    def jinja(self) -> str | None:
        """See `ChatTemplate.jinja`."""
        return None  # two texts, which lie beside the model

    def encode(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """See `ChatTemplate.encode`."""
        return self._of(conversation).encode(conversation, add_generation_prompt=add_generation_prompt)

    def encode_batch(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[Rendered | LlmtuneDataError]:
        """See `ChatTemplate.encode_batch`."""
        rendered = {}
        for template in (self.plain, self.with_tools):
            at = [i for i, conversation in enumerate(conversations) if self._of(conversation) is template]
            of_these = template.encode_batch(
                [conversations[i] for i in at], add_generation_prompt=add_generation_prompt
            )
            rendered.update(zip(at, of_these, strict=True))
        return [rendered[i] for i in range(len(conversations))]

    def _of(self, conversation: Conversation) -> JinjaChat:
        return self.with_tools if conversation.tools else self.plain


def _either(spellings: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)")


def _start(
    asked: _Job, text: Text, number: int, words: Sequence[tuple[int, int, int | None]], mine: Sequence[Span]
) -> int | None:
    """Where a turn begins: after the conversation before it.

    Where the template tells that differently once more turns follow (Mistral's put tools before the last user's turn), after
    what it wrote behind the last word before the turn.
    """
    start = text.starts[number] if number < len(text.starts) else None
    if not isinstance(start, str):
        return start
    bound = mine[0][0] if mine else len(text.text)
    before = [e for _, e, owner in words if owner is not None and owner < asked.turns[number] and e <= bound]
    behind = asked.masks.behind_last(start)
    if not before or behind is None or not text.text.startswith(behind, before[-1]):
        return None
    return min(before[-1] + len(behind), bound)


def _block(text: Text, number: int, turns: int, mine: Sequence[Span]) -> Span | None:
    """The generation block of a turn: the one of its number, or where some turns have none, the one that holds its words."""
    if len(text.spans) == turns:
        return text.spans[number]
    return next(((b, e) for b, e in text.spans if any(b <= begin < e for begin, _ in mine)), None)
