"""The errors a user can mend.

Each carries one line that says *what* is wrong, *where*, and *how to mend it*. The command line prints that line and
exits with the error's code, 2 for most; a library user catches `LlmtuneError`. A traceback of any other type is a defect of
llmtune.
"""

from llmtune import exit_codes


class LlmtuneError(Exception):
    """A mistake in what was given to llmtune: one line, no traceback needed to understand it."""

    exit_code = exit_codes.USAGE


class LlmtuneConfigError(LlmtuneError):
    """A run configuration that cannot be carried out (the YAML file, an override, a flag)."""


class LlmtuneFormatError(LlmtuneError):
    """A model, adapter or tokenizer file that is damaged, incomplete, unsafe or not understood."""


class LlmtuneDataError(LlmtuneError):
    """A data row or file that cannot be used; the message starts with file:line."""


class LlmtuneDivergedError(LlmtuneError):
    """The run's own numbers went wrong, again and again: starting it again would end the same way."""

    exit_code = exit_codes.GAVE_UP


class LlmtuneRetryError(LlmtuneError):
    """What failed is around the run, not in it (the disk, another process): the same command goes on from the last checkpoint."""

    exit_code = exit_codes.RETRY
