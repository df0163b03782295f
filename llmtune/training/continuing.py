"""A run that begins where an earlier one stands: its weights, under another mixture or another schedule, on purpose.

    earlier = find_earlier(run, base_digest)            refuses what does not fit, before anything is read
    trainable = take_over(earlier, trainable, mesh)     before the optimizer's state is made of them

Steps, schedule and data begin anew, and so does the optimizer's state: rates that rise again from zero (`warmup_steps`) are what
continued pre-training needs (Ibrahim et al. 2024, arXiv:2403.08763). To resume a run instead, use its own output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llmtune.config import Run
from llmtune.config.continuing import continuing_of
from llmtune.config.file import flat, parse_yaml, plain
from llmtune.errors import LlmtuneConfigError, LlmtuneError
from llmtune.sharding import replicated
from llmtune.training.checkpoint import arrays, steps
from llmtune.training.checkpoint.digest import digests, to_text
from llmtune.training.checkpoint.manifest import DamagedError, Manifest
from llmtune.training.processes import highest, is_first
from llmtune.training.run_directory import RunDirectory
from llmtune.weights import path_name

MUST_AGREE = (
    "adapt",
    "quantize",
    "data.add_tokens",
    "data.add_special_tokens",
    "data.pad_vocabulary_to",
    "train.masters",
)
TRAINABLE = "trainable/"


@dataclass(frozen=True)
class Earlier:
    """A checkpoint of an earlier run, whose files were found whole."""

    run: Path
    path: Path
    manifest: Manifest

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json and provenance.json."""
        return {"run": str(self.run), "step": self.manifest.step, **self.manifest.run}


def find_earlier(run: Run, base_digest: str) -> Earlier | None:
    """The checkpoint that the run begins with; None where it begins with its model, or has come further already.

    Raises LlmtuneConfigError where there is none, where none is whole, and where the earlier run had another model or adapter.
    """
    asked = continuing_of(run.continue_from)
    if asked is None or steps.steps_on_disk(RunDirectory(Path(run.output).absolute()).checkpoints):
        return None
    directory = RunDirectory(Path(asked.run).absolute())
    if not directory.config.is_file():
        raise LlmtuneConfigError(f"continue_from: {asked.run} is no llmtune run (it has no config.yaml)")
    _require_fit(run, directory, base_digest)
    there = steps.steps_on_disk(directory.checkpoints)
    if asked.step is not None and asked.step not in there:
        raise LlmtuneConfigError(
            f"continue_from.step: {asked.run} has no checkpoint {asked.step}; it has {there or 'none'}"
        )
    step, reasons = _newest_whole(directory, there if asked.step is None else [asked.step])
    if step is None:
        raise LlmtuneConfigError(
            f"continue_from: {asked.run} has no checkpoint to begin with ({'; '.join(reasons) or 'no step'})"
        )
    path = directory.checkpoints / str(step)
    return Earlier(directory.path, path, steps.read_step(path))


def _newest_whole(directory: RunDirectory, candidates: Sequence[int]) -> tuple[int | None, list[str]]:
    """The first of these steps whose files are whole, and what is wrong with those before it.

    Of several processes the first one reads them, all their bytes, and tells the others.
    """
    found, reasons = -1, []
    for step in candidates if is_first() else ():
        try:
            steps.verify_step(directory.checkpoints / str(step))
        except DamagedError as error:
            reasons.append(f"step {step}: {error}")
        else:
            found = step
            break
    (found,) = highest([found])
    return None if found < 0 else found, reasons


def take_over(earlier: Earlier, trainable: Any, mesh: Mesh) -> Any:
    """The earlier weights, laid out as those of this run are; nothing else of the checkpoint is read."""
    own = {TRAINABLE + path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}
    for name, leaf in own.items():
        there = earlier.manifest.arrays.get(name, {})
        if (there.get("shape"), there.get("dtype")) != (list(leaf.shape), leaf.dtype.name):
            raise LlmtuneError(
                f"{earlier.path}: {name} is {there.get('shape', 'absent')} there and {list(leaf.shape)} in this run; "
                "give both runs the same adapt"
            )
    found = arrays.read_part(earlier.path, {name: _abstract(leaf, mesh) for name, leaf in own.items()})
    for name, digest in jax.device_get(digests(found)).items():
        if to_text(digest) != earlier.manifest.arrays[name]["digest"]:
            raise LlmtuneError(
                f"{earlier.path}: {name} is not what was saved; give continue_from.step another checkpoint"
            )
    return jax.tree.unflatten(jax.tree.structure(trainable), [found[name] for name in own])


def _require_fit(run: Run, directory: RunDirectory, base_digest: str) -> None:
    base = directory.base.read_text(encoding="utf-8").strip() if directory.base.is_file() else None
    if base != base_digest:
        raise LlmtuneConfigError(
            f"continue_from: {directory.path} was trained from another model than {run.model}; give that one, or take its "
            "export as the model"
        )
    written = parse_yaml(directory.config.read_text(encoding="utf-8"), str(directory.config))
    there, here = flat(written), flat(plain(run))
    keys = [key for key in {**there, **here} if key.startswith(MUST_AGREE)]
    differing = [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys if there.get(key) != here.get(key)
    ]
    if differing:
        raise LlmtuneConfigError(
            f"continue_from: {directory.path} has other weights that train ({'; '.join(differing[:5])}); give both the same, "
            "or take its export as the model"
        )


def _abstract(leaf: jax.Array, mesh: Mesh) -> jax.ShapeDtypeStruct:
    on_mesh = isinstance(leaf.sharding, jax.sharding.NamedSharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if on_mesh else replicated(mesh))
