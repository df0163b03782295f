"""What a person sees of a run: a live progress line in a terminal, plain lines now and then elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llmtune.redaction import redact

QUIET_SECONDS = 10.0  # between two plain lines where there is no terminal


class Display:
    """A context manager around a run; `note` prints a line, `phase` opens a bar, `advance` moves it."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._name, self._done, self._spoke = "", 0, 0.0
        self._total: int | None = None

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays, without secrets."""
        self._progress.console.print(redact(text), markup=False)

    def phase(self, name: str, total: int | None, done: int = 0) -> None:
        """A new bar in place of the one before: `total` steps (None: unknown), `done` of them already."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, completed=done, status="")
        self._name, self._total, self._done, self._spoke = name, total, done, time.monotonic()

    def advance(self, by: int = 1, status: str = "") -> None:
        """`by` more steps are done."""
        self._done += by
        if self._task is not None:
            self._progress.update(self._task, advance=by, status=status)
        if not self._live and (
            time.monotonic() - self._spoke > QUIET_SECONDS or (self._done == self._total and status)
        ):
            self._spoke = time.monotonic()
            of = "" if self._total is None else f"/{self._total}"
            self.note(f"{self._name} {self._done}{of} {status}".rstrip())


def step_status(row: dict[str, Any]) -> str:
    """`loss 2.312  grad 0.87  lr 1.9e-04  1,234 tok/s  MFU 43.1 %`; what is not known is left out."""
    mfu = f"  MFU {row['mfu']:.1%}".replace("%", " %") if "mfu" in row else ""
    skipped = "  skipped" if row.get("skipped") else ""
    return (
        f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tok/s{mfu}{skipped}"
    )
