"""The vocabulary of a run: the model's own, or one that grew by the tokens that the run adds.

512 rows, 512 tokens, add_tokens: [<|think|>], pad_vocabulary_to: 64   -->   id 512, 576 rows of which 64 are new
"""

from dataclasses import dataclass
from pathlib import Path

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.adapt import sections, unties
from llmtune.data import added_tokens
from llmtune.errors import LlmtuneConfigError
from llmtune.shipped import resolve
from llmtune.tokenizers import AddedTokens, load_tokenizer, write_added_tokens


@dataclass(frozen=True)
class Vocabulary:
    """What a run adds, the first id of it, and the directory of a tokenizer other than the model's own."""

    added: AddedTokens
    first: int
    tokenizer: Path | None

    def complete(self, directory: Path) -> None:
        """Put the added tokens into the tokenizer files that were copied into an export."""
        if self.added:
            write_added_tokens(directory, self.added)


def settle_vocabulary(run: Run, source: pretrained.Source) -> tuple[pretrained.Source, Vocabulary]:
    """The model with a row for every token of the run: resized where the run, or the adapter it continues, asks for it.

    A tied head gets weights of its own where an adapter asks for it.

    Rows of the model's table beyond the tokenizer's tokens are taken by added tokens first.
    """
    source = source.apart() if unties(run.adapt) else source
    for section in sections(run.adapt):
        if section.from_ is not None:
            source = pretrained.fit_to_adapter(source, section.from_)
    added, own = added_tokens(run), None if run.data.tokenizer is None else resolve(run.data.tokenizer)
    if not added:
        return source, Vocabulary(added, source.config.vocab_size, own)
    home = own or source.tokenizer_directory
    tokenizer = None if home is None else load_tokenizer(home)
    if tokenizer is None:
        raise LlmtuneConfigError(
            f"{added.key}: there is no tokenizer to add them to; name one that has a tokenizer.json in data.tokenizer"
        )
    first, rows, multiple = tokenizer.vocab_size, source.config.vocab_size, run.data.pad_vocabulary_to
    needed = first + len(added)
    size = rows if needed <= rows else -(-needed // multiple) * multiple
    return source.resized(size, tokens=first), Vocabulary(added, first, own)


def describe_vocabulary(source: pretrained.Source, vocabulary: Vocabulary, *, adapted: bool) -> list[str]:
    """A line for the log where tokens were added; none elsewhere."""
    if not vocabulary.added:
        return []
    first, last = vocabulary.first, vocabulary.first + len(vocabulary.added) - 1
    ids = f"token added (id {first})" if first == last else f"tokens added (ids {first} to {last})"
    ends = "the embedding trains" if source.config.tie_word_embeddings else "the embedding and the head train"
    return [
        f"vocabulary: {len(vocabulary.added)} {ids}, {source.config.vocab_size:,} rows"
        + (f"; {ends} in whole" if adapted else "")
    ]
