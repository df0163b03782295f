"""A trace of some steps: `llmtune train CONFIG.yaml --profile 10:12`.

A profiler hears of steps as trackers do: the trace begins when the step before the first of them is done, and ends with the
last of them. It lies in profile/, for TensorBoard's profile page or, as a .json.gz, for ui.perfetto.dev.
"""

from pathlib import Path
from typing import Any, final

import jax

from llmtune.errors import LlmtuneConfigError


def parse_steps(text: str) -> range:
    """`10:12` -> steps 10, 11 and 12, as the display counts them. Raises LlmtuneConfigError."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise LlmtuneConfigError(f"--profile: {text!r} is no range of steps; write FIRST:LAST such as 10:12, from 1")
    return range(int(first), int(last) + 1)


@final
class Profiler:
    """A tracker that traces `steps`; those up to `after` were done by an earlier session."""

    def __init__(self, steps: range, directory: Path, after: int):
        self._steps, self._directory, self._tracing = steps, directory, False
        self._begin_before(after + 1)

    def log(self, row: dict[str, Any]) -> None:
        """A step is done: begin before the next, or end."""
        if row["step"] >= self._steps[-1]:
            self.close()
        else:
            self._begin_before(row["step"] + 1)

    def close(self) -> None:
        """What was traced is written, also where the run ends sooner."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def _begin_before(self, step: int) -> None:
        if step in self._steps and not self._tracing:
            self._tracing = True
            jax.profiler.start_trace(str(self._directory))
