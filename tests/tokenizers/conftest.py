"""Real tokenizers, read once: the larger ones take a second."""

from functools import cache

import pytest


@pytest.fixture(scope="session")
def own(assets):
    """Folder of the assets -> llmtune's tokenizer."""
    from llmtune.tokenizers import load_tokenizer

    return cache(lambda folder: load_tokenizer(assets / "tokenizers" / folder))


@pytest.fixture(scope="session")
def hugging_face(assets):
    """Folder of the assets -> transformers' tokenizer."""
    from transformers import AutoTokenizer

    return cache(lambda folder: AutoTokenizer.from_pretrained(assets / "tokenizers" / folder))
