"""Memory in pages of 2 MB for training on CPUs.

XLA takes a step's temporaries from malloc anew each time, and the kernel hands them out in pages of 4 KB: some 100,000 faults
in a step of 25 M parameters. glibc (2.35 and later) asks for large pages if a tunable says so, which it reads once, when a
process starts. The command therefore starts itself again, in the same process, before anything is loaded (20 ms).
"""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

TUNABLE, TRIED = "glibc.malloc.hugetlb", "LLMTUNE_HUGE_PAGES"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Replace this process by itself under `GLIBC_TUNABLES`; returns where that would not help, or was decided before."""
    given = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in given or TRIED in os.environ or not (_on_request() and _tunable() and _on_cpu()):
        return
    tunables = ":".join(filter(None, (given, f"{TUNABLE}=1")))
    own = {"GLIBC_TUNABLES": tunables, TRIED: "1"}  # the second stays where glibc or a launcher drops the first
    with contextlib.suppress(OSError, ValueError):  # where a program cannot be started anew it goes on as it is
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **own})


def _on_request() -> bool:
    """Whether the kernel gives large pages to who asks (under `always` all have them, under `never` none)."""
    try:
        return "[madvise]" in PAGES.read_text(encoding="ascii")
    except OSError:
        return False


def _tunable() -> bool:
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


def _on_cpu() -> bool:
    """As far as can be told without loading jax: it was asked for, or no accelerator is in this machine."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" if asked else not any(_accelerators())


def _accelerators() -> Iterator[Path]:
    """Device files of NVIDIA, AMD, and TPUs in their old and their new form."""
    for pattern in ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*"):
        yield from Path("/dev").glob(pattern)
