"""What an error is at the command line: a line and an exit code, where a user can mend it; else a traceback of a defect."""

import sys

from llmtune import exit_codes
from llmtune.errors import LlmtuneError
from llmtune.redaction import redact


def tell(error: BaseException, interrupted: str = "") -> int | None:
    """Say in a line what is wrong, and give the exit code; None, and nothing is said, of a defect.

    `interrupted`: what follows that word where it was a signal.
    """
    if isinstance(error, KeyboardInterrupt):
        print(f"interrupted{interrupted}", file=sys.stderr)
        return getattr(error, "exit_code", exit_codes.INTERRUPTED)
    if isinstance(error, LlmtuneError):
        return refuse(str(error), error.exit_code)
    if isinstance(error, OSError) and error.filename is not None:
        return refuse(f"{error.filename}: {error.strerror}")
    if isinstance(error, ValueError):
        from llmtune.sharding import ShardingError  # here, for jax comes with it

        return refuse(str(error)) if isinstance(error, ShardingError) else None
    return None


def refuse(message: str, code: int = exit_codes.USAGE) -> int:
    """One line on stderr, without secrets; the code."""
    print(f"llmtune: error: {redact(' '.join(message.splitlines()))}", file=sys.stderr)
    return code
