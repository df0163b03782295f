"""Checkpoints of a run: Orbax, asynchronously, one directory per step.

A step holds the trainable weights, the optimizer's state and the step number, under flat path names, and a note of which run
and which data it belongs to. The frozen base is not stored again: the run's config names it.

This is the only module that knows Orbax. Its V1 interface is used (an attribute of `orbax.checkpoint`, the coming default).
"""

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint
from jax.sharding import Mesh

from llmtune.errors import LlmtuneError
from llmtune.sharding import replicated
from llmtune.training.state import TrainState
from llmtune.weights import path_name

ocp = orbax.checkpoint.v1


@dataclass
class Checkpoints:
    """The checkpoints of one run directory; the newest `keep` stay. Leaving its `with` makes the last save durable."""

    directory: Path
    keep: int

    def __post_init__(self) -> None:
        self._saver = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=ocp.training.preservation_policies.LatestN(self.keep),  # type: ignore[arg-type]
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """The newest step on disk, or None."""
        latest = self._saver.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState) -> None:
        """Start saving. Waits for the save before, so that none is skipped and a failed one is reported here.

        Too little room is said before anything is written: the newest checkpoint goes only once the next is complete.
        """
        self.wait()
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.directory).free
        if free < needed:
            raise LlmtuneError(
                f"{self.directory}: saving a checkpoint failed (no space left on device: it may take "
                f"{needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free); make room, and the same command goes on"
            )
        self._saver.save_checkpointables_async(step, {"state": _flatten(state)}, force=True)

    def restore(self, step: int, like: TrainState, mesh: Mesh) -> TrainState:
        """The state of `step`, laid out like `like` (arrays, whose shardings may be of another mesh than the saved)."""
        target = {name: _abstract(leaf, mesh) for name, leaf in _flatten(like).items()}
        try:
            flat = self._saver.load_checkpointables(step, {"state": target})["state"]
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            raise LlmtuneError(
                f"{self.directory}/{step}: the checkpoint cannot be restored ({reason}); "
                "delete that step's directory to continue from the one before"
            ) from error
        structure = jax.tree.structure(like)
        return jax.tree.unflatten(structure, [flat[name] for name in _flatten(like)])

    def wait(self) -> None:
        """Until what was started is on disk; raises what went wrong, and leaves nothing of it."""
        try:
            self._saver.wait()
        except Exception as error:
            self._discard_halves()
            raise LlmtuneError(f"{self.directory}: saving a checkpoint failed ({_first_line(error)})") from error

    def _discard_halves(self) -> None:
        """Remove what a failed save left; its threads may still be at it for a moment."""
        with contextlib.suppress(Exception):
            self._saver.close()
        for _ in range(50 if jax.process_index() == 0 else 0):
            halves = list(self.directory.glob("*.orbax-checkpoint-tmp"))
            if not halves:
                return
            for half in halves:
                shutil.rmtree(half, ignore_errors=True)
            time.sleep(0.1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait, and release the directory. Where an error is already on its way, a failed save does not hide it."""
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            self.wait()
            self._saver.close()


def _flatten(state: TrainState) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _abstract(leaf: jax.Array, mesh: Mesh) -> jax.ShapeDtypeStruct:
    on_mesh = isinstance(leaf.sharding, jax.sharding.NamedSharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if on_mesh else replicated(mesh))


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return "no space left on device" if "No space left" in text else text.splitlines()[0][:300]
