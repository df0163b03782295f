"""SIGINT and SIGTERM: the first asks, the second ends.

    with on_signals() as stop:              from here on signals are heard
        train(run, stop=stop)
            with stop.deferred():           there is something to lose: the step is finished and saved, then Interrupted is raised
                ...
                if stop.signal: ...

Outside of `deferred` nothing is lost, and the first signal raises Interrupted by itself. A second one ends the process wherever
it is, in a compiler too: signals are read by a thread of their own, from the pipe that the interpreter's own handler writes to.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and has: nothing is lost. `together`: so do all processes of the run, at this very step."""

    def __init__(self, signum: int, *, together: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.exit_code, self.together = 128 + signum, together


class Stop:
    """`signal`: the number of the first signal that came, 0 before."""

    def __init__(self) -> None:
        self.signal = 0
        self._deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Here a signal is only noted: whoever works here looks at `signal` when a step is done."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.signal:
            raise Interrupted(self.signal)

    def _handle(self, signum: int, frame: Any) -> None:
        """In the main thread, at its next instruction of Python."""
        if not self._deferred:
            raise Interrupted(signum)

    def _hear(self, ear: socket.socket) -> None:
        """In a thread, at once; until the other end is closed."""
        with ear:
            while heard := ear.recv(1):
                if heard[0] in SIGNALS:
                    self._note(heard[0])

    def _note(self, signum: int) -> None:
        if self.signal:
            os._exit(128 + signum)
        self.signal = signum
        if self._deferred:
            name = signal.Signals(signum).name
            os.write(2, f"{name}: the step is finished and saved first; once more ends at once\n".encode())


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
    """Hear signals from here on. To be called in the main thread."""
    stop = Stop()
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    threading.Thread(target=stop._hear, args=(ear,), name="signals", daemon=True).start()
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    handlers = {own: signal.signal(own, stop._handle) for own in SIGNALS}
    try:
        yield stop
    finally:
        for own, handler in handlers.items():
            signal.signal(own, handler)
        signal.set_wakeup_fd(before)
        mouth.close()
