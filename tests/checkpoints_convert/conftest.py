"""What a refusal of a foreign file must be: one printable line of bounded length that names the file."""

import pytest

from llmtune.errors import LlmtuneFormatError


@pytest.fixture
def refusal():
    """`refusal(where, call, *arguments)` -> the text of the LlmtuneFormatError that names `where`."""

    def refusal(where, call, *arguments):
        with pytest.raises(LlmtuneFormatError) as caught:
            call(*arguments)
        text = str(caught.value)
        assert text.isprintable() and len(text) < 800, text[:2000]
        assert str(where) in text
        return text

    return refusal
