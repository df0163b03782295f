"""A run that hangs is worse than one that fails: nobody starts it again. This ends it, and says where it hung.

with Watchdog(seconds, directory / "hang.txt") as watchdog:
    for ...:
        step()
        watchdog.alive()
        with watchdog.paused():     what may take as long as it takes: compiling, evaluating, a slow disk
            ...
"""

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from llmtune import exit_codes

USUAL_STEPS, REMEMBERED = 20, 64


class Watchdog:
    """Ends the process with code 70 once no step was finished for `seconds`, and for 20 usual steps. None: never."""

    def __init__(self, seconds: float | None, stacks: Path):
        self._seconds, self._stacks = seconds, stacks
        self._last, self._paused = time.monotonic(), False
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._over = threading.Event()

    def alive(self) -> None:
        """A step is done."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        self._paused = True
        try:
            yield
        finally:
            self._last, self._paused = time.monotonic(), False

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self, seconds: float) -> None:
        while not self._over.wait(min(1.0, seconds / 4)):
            usual = statistics.median(self._durations) if self._durations else 0.0
            limit, quiet = max(seconds, USUAL_STEPS * usual), time.monotonic() - self._last
            if not self._paused and quiet > limit:
                self._end(limit)

    def _end(self, limit: float) -> None:
        try:
            with self._stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"the stacks of all threads are in {self._stacks}"
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
            where = "the stacks of all threads stand above"
        line = f"llmtune: error: no step was finished for {limit:.0f} s; {where}; the same command goes on\n"
        os.write(2, line.encode())
        os._exit(exit_codes.HUNG)
