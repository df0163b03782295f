"""A process takes its place among those of a run, before anything is computed.

Place(None, None, None): found out from the surroundings (TPU pods, also of several slices and under GKE; Slurm, Open MPI,
Kubernetes: what jax.distributed knows).
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmtune import exit_codes
from llmtune.errors import LlmtuneConfigError, LlmtuneRetryError
from llmtune.training.heartbeat import Heartbeat
from llmtune.training.stopping import Interrupted
from llmtune.training.supervisor import PARENT


@dataclass(frozen=True)
class Place:
    """`coordinator`: HOST:PORT of process 0; `processes` of them, of which this is the one with that index."""

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None


def join(place: Place, heartbeat_seconds: float, join_seconds: float) -> Heartbeat:
    """Wait for all processes, and begin to watch over each other. Raises LlmtuneConfigError where there is nothing to join.

    Where they are not all there within `join_seconds`, a line says what to check, and the process ends with code 75.
    """
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would stand in the way of our own
    told = None not in (place.coordinator, place.processes, place.index)
    if place.coordinator is not None and place.index == 0:
        _require_free(place.coordinator)
    try:
        with _deadline(place, join_seconds):
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.index,
                # Under Slurm it would else take one device for each process, also where a process was given a whole node.
                cluster_detection_method="deactivate" if told else None,
                initialization_timeout=int(2 * join_seconds) + 60,
                heartbeat_timeout_seconds=int(3 * heartbeat_seconds) + 10,
            )
    except jax.errors.JaxRuntimeError as error:  # a RuntimeError too
        raise LlmtuneRetryError(f"the processes of this run cannot join: {str(error).splitlines()[0]}") from None
    except (ValueError, RuntimeError) as error:
        raise LlmtuneConfigError(
            f"--processes auto: no pod and no cluster was found ({error}); give --coordinator, --processes and --process"
        ) from None
    return Heartbeat(_host(place), heartbeat_seconds)


def _require_free(coordinator: str) -> None:
    """Where another program listens on the port already, JAX ends with a segmentation fault."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = coordinator.rpartition(":")[2]
    try:
        socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise LlmtuneConfigError(
            f"--coordinator: port {port} cannot be had on this machine ({error.strerror or error}); give a free one"
        ) from None


@contextlib.contextmanager
def _deadline(place: Place, seconds: float) -> Iterator[None]:
    """What is inside ends within `seconds`, or the process does: JAX's own end of patience is SIGABRT and a stack trace."""

    def end() -> None:
        os.write(2, f"llmtune: error: {_absent(place, seconds)}\n".encode())
        os._exit(exit_codes.RETRY)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _absent(place: Place, seconds: float) -> str:
    """Who is missing, and what to check."""
    waited = f"after {seconds:g} s (safeguards.join_seconds)"
    started = "was every process started, with the same configuration"
    if place.coordinator is None:
        return (
            f"the processes of this run are not all there {waited}; {started}, and does a firewall stand between them?"
        )
    if place.index == 0:
        return f"not all of the {place.processes} processes have come to {place.coordinator} {waited}; {started}?"
    host, _, port = place.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except socket.gaierror:
        return f"no machine is called {host} here {waited}; is --coordinator right?"
    except OSError as error:
        return (
            f"process 0 at {place.coordinator} cannot be reached {waited}: {error.strerror or error}; was it started, is the "
            "port free there, and does a firewall stand between?"
        )
    return f"process 0 at {place.coordinator} answers, but not all {place.processes} processes are there {waited}; {started}?"


def _host(place: Place) -> str:
    """Where the others reach process 0: as they were told, or by what it calls itself."""
    if place.coordinator is not None:
        return place.coordinator.rpartition(":")[0].strip("[]")
    told = multihost_utils.broadcast_one_to_all(np.array([*_own_name().encode().ljust(256)], np.uint8))
    return bytes(told.tolist()).decode().strip()


def _own_name() -> str:
    """This machine's address; its name where the address says "here" alone, as /etc/hosts of many Linux systems has it."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        return name if address.startswith("127.") else address
    return name


@contextlib.contextmanager
def ending_at_once(tell: Callable[[BaseException], int | None]) -> Iterator[None]:
    """An error of one process of several ends it here: at Python's end JAX would wait for the others, who wait for this one.

    So does a signal that only this one has heard. Its exit code is its own, which says whether starting again helps. `tell`:
    see `llmtune.failures`.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or (isinstance(error, Interrupted) and error.together):
            raise
        code = tell(error)
        if code is None:
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        os._exit(1 if code is None else code)


def end_with_parent() -> None:
    """Where a supervisor started this process, end as on SIGTERM when it is gone: nobody else would."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
