"""Small files of a run: each appears complete or not at all, and a disk that takes no more is one clear line.

with written_plainly(path):     OSError (no space, no permission)  -->  LlmtuneError naming the file
    ...
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.redaction import redact


@contextlib.contextmanager
def written_plainly(path: Path) -> Iterator[None]:
    """Around anything that writes `path`; a failed write, unlike a failed open, does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise LlmtuneError(
            f"{path}: cannot be written ({error.strerror or error}); mend that, and the same command goes on"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """The file appears complete or not at all; a failure leaves what was there before, and nothing beside it.

    Secrets are taken out of the text.
    """
    partial = path.with_name(path.name + ".partial")
    with written_plainly(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(redact(text))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
