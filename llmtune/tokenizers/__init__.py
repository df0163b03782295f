"""Tokenizers behind one protocol, read from what lies beside a model's weights."""

from pathlib import Path

from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.tokenizers.chat import load_chat_template
from llmtune.tokenizers.protocol import Tokenizer
from llmtune.tokenizers.sentencepiece_model import read_sentencepiece
from llmtune.tokenizers.tokenizer_json import read_tokenizer_json

__all__ = ["Tokenizer", "check_fits", "load_chat_template", "load_tokenizer"]


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """tokenizer.json first, else a sentencepiece tokenizer.model; None where there is neither."""
    if (directory / "tokenizer.json").is_file():
        return read_tokenizer_json(directory)
    model = directory / "tokenizer.model"
    if not model.is_file():
        return None
    if b" 0\n" in model.read_bytes()[:64]:  # lines of "base64 rank": tiktoken's format
        raise LlmtuneFormatError(
            f"{model}: tiktoken files are not read yet; put the tokenizer.json of the model beside it"
        )
    return read_sentencepiece(model)


def check_fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    largest = max(tokenizer.vocab_size - 1, *tokenizer.eos_ids, tokenizer.bos_id or 0)
    if largest >= config.vocab_size:
        raise LlmtuneFormatError(
            f"tokenizer: it gives ids up to {largest}, the model's vocabulary has {config.vocab_size}; "
            "they do not belong together"
        )
