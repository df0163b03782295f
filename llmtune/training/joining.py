"""A process takes its place among those of a run, before anything is computed.

Place(None, None, None): found out from the surroundings (TPU pods, Slurm, Open MPI, Kubernetes: what jax.distributed knows).
"""

import os
import signal
import socket
import threading
import time
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmtune.errors import LlmtuneConfigError
from llmtune.training.heartbeat import Heartbeat
from llmtune.training.supervisor import PARENT


@dataclass(frozen=True)
class Place:
    """`coordinator`: HOST:PORT of process 0; `processes` of them, of which this is the one with that index."""

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None


def join(place: Place, heartbeat_seconds: float) -> Heartbeat:
    """Wait for all processes, and begin to watch over each other. Raises LlmtuneConfigError where there is nothing to join."""
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would stand in the way of our own
    try:
        jax.distributed.initialize(
            place.coordinator, place.processes, place.index, heartbeat_timeout_seconds=int(3 * heartbeat_seconds) + 10
        )
    except ValueError as error:
        raise LlmtuneConfigError(
            f"--processes auto: no pod and no cluster was found ({error}); give --coordinator, --processes and --process"
        ) from None
    return Heartbeat(_host(place), heartbeat_seconds)


def _host(place: Place) -> str:
    """Where the others reach process 0: as they were told, or by what it calls itself."""
    if place.coordinator is not None:
        return place.coordinator.rpartition(":")[0].strip("[]")
    own = socket.gethostbyname(socket.gethostname()).encode()
    told = multihost_utils.broadcast_one_to_all(np.array([*own.ljust(64)], np.uint8))
    return bytes(told.tolist()).decode().strip()


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
