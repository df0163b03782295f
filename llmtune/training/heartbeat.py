"""Signs of life between the processes of a run: one that is lost ends the others, which would wait for it for ever.

    process 0, the hub  <--- "beat" each second, one connection each --->  process 1, 2, ...

A connection that breaks without a "bye", and one that is silent for `seconds`, mean that the process at its other end is lost:
a line says so, and this process ends with code 75, which says that the same command goes on. JAX's own heartbeat would end it
too, later, without a line of its own, and with SIGABRT.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import threading
import time
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmtune import exit_codes
from llmtune.errors import LlmtuneError, LlmtuneRetryError
from llmtune.training.stopping import Interrupted

BEAT, BYE, LOST, TOKEN_BYTES = b"beat", b"bye", b"lost", 8
CONNECT_SECONDS, NOTICE_SECONDS = 30.0, 2.0


class Heartbeat:
    """To be made in all processes at once, and held as a context manager while they need each other. `host`: where process 0 is.

    With one process it does nothing.
    """

    def __init__(self, host: str, seconds: float):
        self._seconds, self._lock, self._over = seconds, threading.Lock(), threading.Event()
        self._connections: dict[int, socket.socket] = {}
        if jax.process_count() == 1:
            return
        listener, token, port = None, b"\0" * TOKEN_BYTES, 0
        if jax.process_index() == 0:
            listener, token = (
                socket.create_server(("", 0), backlog=jax.process_count()),
                secrets.token_bytes(TOKEN_BYTES),
            )
            port = listener.getsockname()[1]
        told = multihost_utils.broadcast_one_to_all(np.array([port, *token], np.int32))
        token = bytes(told[1:].tolist())
        if listener is not None:
            self._accept_all(listener, token)
        else:
            self._connect(host, int(told[0]), token)

    def _accept_all(self, listener: socket.socket, token: bytes) -> None:
        deadline = time.monotonic() + CONNECT_SECONDS
        while len(self._connections) < jax.process_count() - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
                connection.settimeout(CONNECT_SECONDS)
                hello = connection.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
            except TimeoutError:
                raise LlmtuneRetryError("the other processes do not answer; the same command goes on") from None
            if hello[:TOKEN_BYTES] == token:
                self._connections[int.from_bytes(hello[TOKEN_BYTES:], "big")] = connection
            else:
                connection.close()
        listener.close()

    def _connect(self, host: str, port: int, token: bytes) -> None:
        try:
            connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            connection.sendall(token + jax.process_index().to_bytes(4, "big"))
        except OSError as error:
            raise LlmtuneRetryError(
                f"process 0 at {host} cannot be reached ({error}); the same command goes on"
            ) from None
        self._connections[0] = connection

    def __enter__(self) -> "Heartbeat":
        for index, connection in self._connections.items():
            connection.settimeout(self._seconds)
            threading.Thread(target=self._listen, args=(index, connection), name=f"heart-{index}", daemon=True).start()
        if self._connections:
            delay_abort()
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A clean end says goodbye. An error may be only what the loss of another process looks like: that is waited for."""
        if isinstance(error, Exception) and not isinstance(error, LlmtuneError) and self._connections:
            time.sleep(NOTICE_SECONDS)
        self._over.set()
        if error is None or (isinstance(error, Interrupted) and error.together):
            self._send(BYE)

    def _beat(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 5)):
            self._send(BEAT)

    def _send(self, word: bytes) -> None:
        with self._lock:
            for connection in self._connections.values():
                with contextlib.suppress(OSError):  # whoever listens to it notices
                    connection.sendall(word + b"\n")

    def _listen(self, index: int, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    word = line.split()
                    if word[0] == BYE:
                        return
                    if word[0] == LOST:
                        return self._end(int(word[1]), "")
            why = "its connection broke"
        except TimeoutError:
            why = f"no sign of life for {self._seconds:g} s"
        except OSError as error:
            why = error.strerror or str(error)
        self._end(index, f" ({why})")

    def _end(self, index: int, why: str) -> None:
        if self._over.is_set():
            return
        line = f"llmtune: error: process {index} of {jax.process_count()} is lost{why}; the same command goes on\n"
        self._send(LOST + b" %d" % index)
        os.write(2, line.encode())
        os._exit(exit_codes.RETRY)


def delay_abort() -> None:
    """An abort waits a few seconds, in the thread that aborts: JAX aborts on the loss of process 0, which is ours to tell.

    The handler is the C library's sleep, which takes the number of the signal, 6, for its seconds; no Python runs in it.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
