"""Memory that a computation on CPUs freed, given back to the system.

XLA takes buffers from malloc on threads of its own, and glibc keeps what they free in an arena for each thread: a process that
generates again and again holds the weights as decoding reads them once for every thread, though none is in use.
"""

import contextlib
import ctypes


def give_back_freed_memory() -> None:
    """Ask the C library for it; one that has no such call (musl, macOS) does as it likes."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
