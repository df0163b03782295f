"""The checkpoints of a run: saved while it goes on, and the newest good one restored.

    with Checkpoints(directory, retention, run, retries, say, note) as checkpoints:
        state, step = checkpoints.restore(state, mesh)
        ...
        checkpoints.save(step, state, figures)      returns at once
        checkpoints.has_failed()                    asked after each step: a failed save is made good by the next call of save
        checkpoints.finish(step, state, figures)    returns when the step counts

A save that fails is told at once and tried again; one that fails more than `retries` times in a row stops the run with an error
that says that the same command goes on.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llmtune.errors import LlmtuneError, LlmtuneRetryError
from llmtune.sharding import replicated
from llmtune.training.checkpoint import arrays, steps
from llmtune.training.checkpoint.commit import Commit
from llmtune.training.checkpoint.digest import digests, to_text
from llmtune.training.checkpoint.manifest import DamagedError, Manifest
from llmtune.training.checkpoint.retention import Retention
from llmtune.training.files import written_plainly
from llmtune.training.processes import first_told, is_first, wait_for_all
from llmtune.training.state import TrainState
from llmtune.weights import path_name


class Checkpoints:
    """Its `with` holds the directory against other processes; leaving it waits for what is under way.

    `run`: what the steps belong to, hashes by name, which a restored step must have too; `say`: where a person reads a line;
    `note`: is told each step that counts.
    """

    def __init__(
        self,
        directory: Path,
        retention: Retention,
        run: dict[str, str],
        retries: int,
        say: Callable[[str], None],
        note: Callable[[int], None] = lambda step: None,
    ):
        self.directory, self._retention, self._run, self._retries = directory, retention, run, retries
        self._say, self._note = say, note
        self._under_way: Commit | None = None
        self._failure: str | None = None  # of a save that could not even begin
        self._failures = 0  # in a row
        self._attempted: int | None = None  # the step of the save whose end was not yet seen by all
        self.committed: int | None = None  # the newest step of this session that counts
        self._figures: dict[int, dict[str, float]] = {}
        self._held: int | None = None

    def restore(self, like: TrainState, mesh: Mesh) -> TrainState | None:
        """The newest good step's state, laid out like `like`, whose mesh may be another than the saved. None: no steps at all.

        Steps that are damaged get a name that says so. Raises LlmtuneError where there are steps and none is good: a run that
        has come somewhere never begins anew by itself.
        """
        reasons: list[str] = []
        while (step := self._newest_good(reasons)) is not None:
            try:
                state = self._read(step, like, mesh)
            except DamagedError as error:
                self._set_aside(step, str(error), reasons)
                wait_for_all(f"step {step} is set aside")
            else:
                self.committed = step
                return state
        lost = reasons or [f"{name} from before" for name in steps.damaged_steps(self.directory)]
        if lost:
            raise LlmtuneError(
                f"{self.directory}: no checkpoint can be gone on from ({'; '.join(lost)}); put a good one back, or begin anew "
                "with another output"
            )
        return None

    def _newest_good(self, reasons: list[str]) -> int | None:
        """Asked in the first process, and told to all: they read the same disk, but not at the same moment."""
        found = -1
        if is_first():
            for step in steps.steps_on_disk(self.directory):
                check = steps.verify_step if found < 0 else steps.read_step  # of the older ones the figures are enough
                try:
                    self._figures[step] = self._belongs(check(self.directory / str(step))).figures
                except DamagedError as error:
                    self._set_aside(step, str(error), reasons)
                    continue
                found = max(found, step)
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        return None if found < 0 else found

    def _belongs(self, manifest: Manifest) -> Manifest:
        for name, own in self._run.items():
            if manifest.run.get(name) != own:
                raise DamagedError(f"it belongs to a run with another {name}")
        return manifest

    def _set_aside(self, step: int, reason: str, reasons: list[str]) -> None:
        reasons.append(f"step {step}: {reason}")
        self._figures.pop(step, None)
        if is_first():
            path = self.directory / str(step)
            with written_plainly(path):
                kept = steps.quarantine(path)
            self._say(f"the checkpoint of step {step} is damaged ({reason}); it is kept as {kept.name}")

    def _read(self, step: int, like: TrainState, mesh: Mesh) -> TrainState:
        path = self.directory / str(step)
        manifest, target = steps.read_step(path), {name: _abstract(own, mesh) for name, own in flatten(like).items()}
        _require_same_arrays(path, manifest, target)
        try:
            found = arrays.read(path, target)
        except Exception as error:  # its bytes are those that were committed: something else is wrong
            raise LlmtuneRetryError(
                f"{path}: the checkpoint cannot be read ({_first_line(error)}); mend that, and the same command goes on"
            ) from error
        for name, digest in jax.device_get(digests(found)).items():
            if to_text(digest) != manifest.arrays[name]["digest"]:
                raise DamagedError(f"{name} is not what was saved")
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in target])

    def has_failed(self) -> bool:
        """Whether the last save has ended badly here. Asks, and does not wait; what has ended well counts from here on."""
        if self._failure is not None:
            return True
        if self._under_way is None or not self._under_way.is_over:
            return False
        if self._under_way.error is None:
            self._count(self._under_way)
        return self._under_way is not None

    def save(self, step: int, state: TrainState, figures: dict[str, float] | None = None) -> None:
        """Start saving; waits for the save before, so that none is skipped. Raises LlmtuneRetryError after too many failures.

        To be called in all processes at the same step, as are `finish` and `wait`: what fails in one of them has failed.
        """
        self._settle()
        if self.committed == step:
            return
        self._attempted = step
        self._failure = first_told(self._missing_room(state))
        if self._failure is not None:
            return
        kept = {name: float(value) for name, value in (figures or {}).items() if isinstance(value, (int, float))}
        try:
            self._under_way = Commit(
                self.directory, step, flatten(state), self._run, kept, lambda: self._retain(step, kept)
            )
        except Exception as error:
            self._fail(error, others_wait=True)

    def finish(self, step: int, state: TrainState, figures: dict[str, float] | None = None) -> None:
        """Save, and return when the step counts in the eyes of all processes."""
        while self.committed != step:
            if self._under_way is None or self._under_way.step != step:
                self.save(step, state, figures)
            self._settle()
        wait_for_all(f"step {step} is committed")

    def wait(self) -> None:
        """Until what was started is over; a failure is counted, told, and left to the next save."""
        self._settle()

    def _settle(self) -> None:
        """See a save to its end, in all processes."""
        self._await()
        attempted, self._attempted = self._attempted, None
        failure, self._failure = first_told(self._failure), None
        if failure is None:
            self._failures = 0 if attempted is not None else self._failures
            return
        if self.committed == attempted:  # this process has done its part, and the step does not count all the same
            self.committed = None
        self._failures += 1
        if is_first():
            steps.remove_halves(self.directory)
        told = f"{self.directory}: saving a checkpoint failed ({failure})"
        if self._failures > self._retries:
            raise LlmtuneRetryError(f"{told}; mend that, and the same command goes on from the last checkpoint")
        self._say(f"{told}; it is tried again")

    def _await(self) -> None:
        """Until this process's part of a save is over, good or bad."""
        if self._under_way is None:
            return
        error = self._under_way.wait()
        if error is None:
            self._count(self._under_way)
        else:
            ended, self._under_way = self._under_way, None
            self._fail(error, others_wait=not ended.arrays_written)

    def _fail(self, error: Exception, *, others_wait: bool) -> None:
        """Left to the next save, but where the others wait within Orbax for this process's part: they end with it."""
        self._failure = _first_line(error)
        if others_wait and jax.process_count() > 1:
            raise LlmtuneRetryError(
                f"{self.directory}: saving a checkpoint failed ({self._failure}); mend that, and the same command goes on "
                "from the last checkpoint"
            )

    def _count(self, ended: Commit) -> None:
        self._under_way, self.committed = None, ended.step
        self._note(ended.step)

    def _missing_room(self, state: TrainState) -> str | None:
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.directory).free
        if free >= needed:
            return None
        return f"no space left on device: it may take {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"

    def _retain(self, step: int, figures: dict[str, float]) -> None:
        self._figures[step] = figures
        for old in self._retention.removable(self._figures):
            with contextlib.suppress(OSError):  # what cannot be removed is no reason to stop
                steps.remove_step(self.directory, old)
            self._figures.pop(old)

    def __enter__(self) -> "Checkpoints":
        """Raises LlmtuneRetryError where another process is at it: two runs in one directory would ruin both."""
        if is_first():
            with written_plainly(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            self._held = steps.hold(self.directory)
            if self._held is None:
                raise LlmtuneRetryError(
                    f"{self.directory}: another process trains this run; wait until it has ended, or choose another output"
                )
            steps.remove_halves(self.directory)
        wait_for_all("the checkpoints are tidy")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Where an error is already on its way, a failed save does not hide it, and no other process is asked about it."""
        try:
            if error is None:
                self._settle()
                if is_first():  # threads of a save that failed may have begun a half after it was tidied up
                    steps.remove_halves(self.directory)
            else:
                with contextlib.suppress(Exception):
                    self._await()
        finally:
            if self._held is not None:
                os.close(self._held)
                self._held = None


def flatten(state: TrainState) -> dict[str, jax.Array]:
    """The leaves of a state by path name."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _require_same_arrays(path: Path, manifest: Manifest, target: dict[str, Any]) -> None:
    """Orbax would cast one dtype to another without a word."""
    here = {name: (list(own.shape), own.dtype.name) for name, own in target.items()}
    there = {name: (own["shape"], own["dtype"]) for name, own in manifest.arrays.items()}
    differing = sorted(name for name in {**here, **there} if here.get(name) != there.get(name))
    if differing:
        name = differing[0]
        raise LlmtuneError(
            f"{path}: {name} is {there.get(name, 'absent')} in the checkpoint and {here.get(name, 'absent')} in this run "
            f"({len(differing)} arrays differ); it was written by another version of llmtune or of optax: begin anew with "
            "another output"
        )


def _abstract(leaf: jax.Array, mesh: Mesh) -> jax.ShapeDtypeStruct:
    on_mesh = isinstance(leaf.sharding, jax.sharding.NamedSharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if on_mesh else replicated(mesh))


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return "no space left on device" if "No space left" in text else text.splitlines()[0][:300]
