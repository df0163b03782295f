"""One save, from its first byte to the moment that its step counts.

    Orbax writes 200.partial  -->  files read back and hashed, MANIFEST.json, fsync of all  -->  renamed to 200, fsync

A thread carries it through while the run goes on. Whatever ends it before the rename leaves no step.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmtune.training.checkpoint.arrays import start_writing
from llmtune.training.checkpoint.digest import digests, to_text
from llmtune.training.checkpoint.manifest import FILE, Manifest
from llmtune.training.checkpoint.steps import PARTIAL, describe_files, make_durable, sync
from llmtune.training.processes import is_first


class Commit:
    """A save under way. `figures` and `run` go into the manifest; `after` runs once the step counts, in the first process."""

    def __init__(
        self,
        directory: Path,
        step: int,
        arrays: dict[str, jax.Array],
        run: dict[str, str],
        figures: dict[str, float],
        after: Callable[[], None],
    ):
        self.step = step
        self.arrays_written = False  # by all processes: from then on none of them waits for another one
        self.error: Exception | None = None
        self._path, self._partial = directory / str(step), directory / f"{step}{PARTIAL}"
        self._run, self._figures, self._after = run, figures, after
        self._arrays = {name: {"shape": list(own.shape), "dtype": own.dtype.name} for name, own in arrays.items()}
        self._digests = digests(arrays)  # enqueued before the arrays are given away
        self._written = start_writing(self._partial, arrays)
        self._thread = threading.Thread(target=self._carry_through, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it has come to its end, good or bad; `error` says which."""
        return not self._thread.is_alive()

    def wait(self) -> Exception | None:
        """Until it is over; what went wrong, if anything did."""
        self._thread.join()
        return self.error

    def _carry_through(self) -> None:
        try:
            self._written()
            self.arrays_written = True
            if is_first():
                self._commit()
                self._after()
        except Exception as error:
            self.error = error

    def _commit(self) -> None:
        found: dict[str, Any] = {name: np.asarray(own) for name, own in self._digests.items()}
        arrays = {name: {**own, "digest": to_text(found[name])} for name, own in self._arrays.items()}
        manifest = Manifest(self.step, self._run, self._figures, arrays, describe_files(self._partial))
        (self._partial / FILE).write_text(manifest.to_text(), encoding="utf-8")
        make_durable(self._partial)
        os.rename(self._partial, self._path)
        sync(self._path.parent)
