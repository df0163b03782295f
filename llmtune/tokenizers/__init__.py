"""Tokenizers behind one protocol, read from what lies beside a model's weights."""

from pathlib import Path

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.tokenizers.added_tokens import NONE_ADDED, AddedTokens, write_added_tokens
from llmtune.tokenizers.chat import load_chat_template, write_chat_template
from llmtune.tokenizers.protocol import Tokenizer
from llmtune.tokenizers.sentencepiece_model import read_sentencepiece
from llmtune.tokenizers.tiktoken_ranks import is_tiktoken, read_tekken, read_tiktoken
from llmtune.tokenizers.tokenizer_json import read_tokenizer_json

__all__ = [
    "AddedTokens",
    "Tokenizer",
    "check_fits",
    "load_chat_template",
    "load_tokenizer",
    "write_added_tokens",
    "write_chat_template",
]


def load_tokenizer(directory: Path, added: AddedTokens = NONE_ADDED) -> Tokenizer | None:
    """The tokenizer of a directory, from the first of these that lies there; None where there is none.

    1. `tokenizer.json` (what transformers reads), 2. `tekken.json`, 3. `tokenizer.model`: tiktoken's ranks of Llama 3 or a
    sentencepiece model, as its first bytes tell, 4. sentencepiece under Mistral's names, `*.model.v1`, `.v2`, `.v3`,
    the highest version. A file that is there is never passed over: where it is damaged, that is the answer.
    A run's own tokens can only be `added` to a tokenizer.json.
    """
    if (directory / "tokenizer.json").is_file():
        return read_tokenizer_json(directory, added)
    if added:
        raise LlmtuneConfigError(
            f"{added.key}: {directory} has no tokenizer.json, the only tokenizer file that can carry added tokens; "
            "put the model's tokenizer.json there, or name a directory that has one in data.tokenizer"
        )
    if (directory / "tekken.json").is_file():
        return read_tekken(directory / "tekken.json")
    plain = directory / "tokenizer.model"
    versions = sorted(directory.glob("*.model.v[0-9]*"), key=lambda path: (path.suffix, path.name))
    models = [path for path in (plain, *reversed(versions)) if path.is_file()]
    if not models:
        return None
    return read_tiktoken(models[0]) if is_tiktoken(models[0]) else read_sentencepiece(models[0])


def check_fits(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    """Refuse a tokenizer (that of `directory`) with ids that the model has no embedding for."""
    largest = max(tokenizer.vocab_size - 1, *tokenizer.eos_ids, tokenizer.bos_id or 0)
    if largest >= config.vocab_size:
        raise LlmtuneFormatError(
            f"{directory}: its tokenizer gives ids up to {largest}, the model's vocabulary has {config.vocab_size}; "
            "they do not belong together; put the model's own tokenizer files there"
        )
