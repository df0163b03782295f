"""The data of a run: sources read and joined, and everything that a run says about them."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.config import DataSource, Run, sources_of
from llmtune.data.batches import BatchSource
from llmtune.data.dataset import Dataset, join
from llmtune.data.feed import Feed, Planned, Streamed
from llmtune.data.files import files_digest
from llmtune.data.first_row import Look, look_at
from llmtune.data.formats import instruction_prompt, uses_template
from llmtune.data.mixture import Mixture, short_names
from llmtune.data.pooling import Alone, Peers
from llmtune.data.sources import Reading, SourceReport, Tick, first_documents
from llmtune.data.stream import Position, Stream, StreamedSource
from llmtune.errors import LlmtuneConfigError, LlmtuneDataError
from llmtune.models.config import ModelConfig
from llmtune.shipped import resolve
from llmtune.tokenizers import AddedTokens, Tokenizer, check_fits, load_chat_template, load_tokenizer
from llmtune.tokenizers.conversation import ChatTemplate
from llmtune.tokenizers.turns import chat_prompt, end_ids


@dataclass(frozen=True)
class RunData:
    """Training and held-out examples, and an account of the files they came from.

    `digest`: sha256 of all files; `notes`: a line per source; `look`: what the first row looks like to the model, and what
    is odd about it; `template`: the chat template that training rows were rendered with, None where none was.
    `streamed`: what training reads as it goes; then `train` is the first few documents, and `digest` of names and sizes.
    """

    train: Dataset
    validation: Dataset | None
    tokenizer: Tokenizer | None
    digest: str
    notes: tuple[str, ...]
    sources: tuple[SourceReport, ...] = ()
    template: ChatTemplate | None = None
    look: Look = field(default_factory=Look)
    streamed: tuple[StreamedSource, ...] = ()

    @property
    def source_names(self) -> tuple[str, ...]:
        """Of the training sources, in short, each another."""
        return short_names([source.path for source in self.sources if source.key == "data.train"])

    def source(self, run: Run, steps: int, share: Sequence[int] | None = None) -> BatchSource:
        """The run's training batches, of each global batch the rows of `share`; None: all."""
        return BatchSource(
            self.train,
            run.train.batch_size,
            run.data.sequence_length,
            run.train.seed,
            run.data.packing,
            run.data.shuffle,
            steps,
            share,
        )

    def feed(
        self, run: Run, steps: int, share: Sequence[int], known: Callable[[int], tuple[int, Position] | None]
    ) -> Feed:
        """What the loop takes batches from, the rows of `share`. `known`: recorded positions of a stream (see `Streamed`)."""
        if not self.streamed:
            return Planned(self.source(run, steps, share))
        length, rows = run.data.sequence_length, run.train.batch_size
        return Streamed(Stream(self.streamed, rows, length, tuple(share)), steps, known)

    def steps(self, run: Run) -> int:
        """Updates that the run asks for: `steps`, or as many as its epochs have batches."""
        if run.train.epochs is None:
            return 200 if run.train.steps is None else run.train.steps
        rows = self.source(run, steps=1).rows_in(run.train.epochs)
        return max(1, math.ceil(rows / run.train.batch_size))

    def prompt_ids(self, prompt: str) -> list[int]:
        """A prompt as the training rows have theirs: a user's turn, an instruction, or the plain text."""
        assert self.tokenizer is not None
        if self.template is not None:
            return chat_prompt(self.template, prompt)
        return self.tokenizer.encode(self.plain_prompt(prompt), bos=self.tokenizer.add_bos)

    def plain_prompt(self, prompt: str) -> str:
        """A prompt as text, where no chat template says how: in the published wording where rows are instructions."""
        plain = self.template is None
        trained = {source.format for source in self.sources if source.key == "data.train"}
        return instruction_prompt(prompt) if plain and any(map(uses_template, trained)) else prompt

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Where a sample stops: at the model's eos ids, and at the end of a turn of the chat template."""
        return () if self.tokenizer is None else end_ids(self.tokenizer, self.template)


def load_data(
    run: Run, config: ModelConfig, directory: Path | None, tick: Tick = lambda rows: None, peers: Peers | None = None
) -> RunData:
    """Read and tokenise everything; raises LlmtuneError with file:line for what cannot be used.

    `peers`: the processes that read it together, each its share; all of them get the same (None: this one reads all).
    """
    tokenizer, template = _tokenizer(run, config, directory)
    reading = Reading(run, config, tokenizer, template, peers or Alone())

    def load(given: str | list[str | DataSource], key: str) -> tuple[Dataset, list[SourceReport], list[str]]:
        sources = sources_of(given)
        datasets, reports, notes = zip(*reading.load(sources, key, tick), strict=True)
        weights = tuple(source.weight for source in sources)
        sizes = tuple(map(len, datasets))
        mixture = Mixture(sizes, weights) if set(weights) != {1} else None
        return join(datasets, mixture), list(reports), list(notes)

    streamed: tuple[StreamedSource, ...] = ()
    if run.data.streaming:
        opened = [reading.stream(source, number) for number, source in enumerate(sources_of(run.data.train))]
        streamed = tuple(own for own, _, _ in opened)
        reports, notes = [report for _, report, _ in opened], [note for _, _, note in opened]
        train = first_documents(streamed[0], run.data.sequence_length)
    else:
        train, reports, notes = load(run.data.train, "data.train")
    used = template if any(report.template for report in reports) else None
    digest, validation = files_digest([file for report in reports for file in report.files]), None
    if run.data.validation:
        validation, others, more = load(run.data.validation, "data.validation")
        other = files_digest([file for report in others for file in report.files])
        digest = hashlib.sha256(f"{digest} {other}".encode()).hexdigest()
        reports, notes = reports + others, notes + more
    look = look_at(train, tokenizer, used)
    return RunData(train, validation, tokenizer, digest, tuple(notes), tuple(reports), used, look, streamed)


def _tokenizer(run: Run, config: ModelConfig, directory: Path | None) -> tuple[Tokenizer | None, ChatTemplate | None]:
    home = directory if run.data.tokenizer is None else resolve(run.data.tokenizer)
    tokenizer = None if home is None else load_tokenizer(home, added_tokens(run))
    if run.data.tokenizer is not None and tokenizer is None:
        raise LlmtuneDataError(f"data.tokenizer: {run.data.tokenizer} holds no tokenizer.json and no tokenizer.model")
    if tokenizer is None or home is None:
        if run.evaluate.prompts:
            raise LlmtuneConfigError(
                "evaluate.prompts: the model has no tokenizer to read them; set data.tokenizer, or leave them out"
            )
        return None, None
    check_fits(tokenizer, config, home)
    return tokenizer, load_chat_template(home, tokenizer, run.data.chat_template)


def added_tokens(run: Run) -> AddedTokens:
    """The tokens that a run adds to its tokenizer."""
    return AddedTokens(tuple(run.data.add_tokens), tuple(run.data.add_special_tokens))
