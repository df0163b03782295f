"""Runs of several processes: all compute, the first one writes what is the same for all.

    if is_first():
        write_report(directory)

Checkpoints are not among it: there every process writes its part.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Until every process has come to `moment`: what the first writes next, no other still looks for."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


@contextlib.contextmanager
def written_once(directory: Path) -> Iterator[Path]:
    """Where to write what takes all processes to produce: the first one's is kept, the others' is thrown away."""
    if is_first():
        yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="llmtune-") as scratch:
            yield Path(scratch)


def own_rows(rows: int) -> slice:
    """This process's share of the rows of a global batch, which its processes divide."""
    share = rows // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)
