"""`run.json`: what is true of a run beside its curve, for the report and for whoever finds the directory later.

    {"model": {...}, "data": {...}, "steps": 400, "sessions": [{"started": ..., "ended": ..., "outcome": "finished", ...}]}

A session is one call of `llmtune train` on the directory; an interrupted run has several. The file is replaced as a whole
whenever something is learnt, so that it can be read while the run goes on and after it was killed.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import resource
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from types import TracebackType
from typing import Any

import jax
import numpy as np

import llmtune
from llmtune import pretrained
from llmtune.config import Run
from llmtune.data import Dataset, RunData, SourceReport
from llmtune.models.decoder import declare
from llmtune.training.processes import is_first
from llmtune.training.program import Program
from llmtune.training.run_directory import RunDirectory, write_whole
from llmtune.training.state import TrainState

Facts = dict[str, Any]
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Session:
    """This call of `llmtune train`. As a context manager it learns how the call ends: finished, interrupted or failed.

    `began`: when the first one did, in seconds since 1970.
    """

    def __init__(self, directory: RunDirectory, run_facts: Facts, own: Facts):
        self._path, self._clock = directory.facts, time.monotonic()
        self._own = {"started": _now(), "ended": None, "outcome": "running", **own}
        earlier = directory.read_facts().get("sessions", [])
        self.began = datetime.fromisoformat((earlier or [self._own])[0]["started"]).timestamp()
        self._facts = {**run_facts, "sessions": [*earlier, self._own]}

    def note(self, **facts: Any) -> None:
        """Add to what is known of this session, and write it down with the time and the memory taken so far."""
        seconds = round(time.monotonic() - self._clock, 3)
        self._own |= {**facts, "seconds": seconds, **peak_memory()}
        if is_first():
            write_whole(self._path, json.dumps(self._facts, indent=2, ensure_ascii=False) + "\n")

    def __enter__(self) -> "Session":
        self.note()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return self.note(ended=_now(), outcome="finished")
        outcome: Facts = {"outcome": "interrupted"}
        if not isinstance(error, KeyboardInterrupt):
            reason = (str(error).splitlines() or [""])[0][:300]
            outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {reason}"}
        with contextlib.suppress(OSError):  # a full disk does not hide the error that is on its way
            self.note(ended=_now(), **outcome)


def run_facts(
    run: Run, source: pretrained.Source, data: RunData, steps: int, state: TrainState, program: Program
) -> Facts:
    """What holds for all sessions. Per-source entries of the data go into `sources`, each with a `name`."""
    config = source.config
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    model = {
        "name": source.name,
        "architecture": config.architecture,
        "parameters": sum(math.prod(spec.shape) for spec in jax.tree.leaves(declare(config)[1])),
        "trainable_parameters": trained,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocabulary": config.vocab_size,
    }
    parts = {"train": data.train, "validation": data.validation}
    described = {name: dataset_facts(name, data, own) for name, own in parts.items() if own is not None}
    return {"model": model, "data": {"sha256": data.digest, "notes": list(data.notes), **described}, "steps": steps}


def dataset_facts(part: str, data: RunData, dataset: Dataset) -> Facts:
    """Counts, and a hash of the tokens themselves: equal where two runs saw the same examples in the same form.

    `part` is train or validation; each of its sources has its own account.
    """
    digest = hashlib.sha256()
    for array in (dataset.input_ids, dataset.labels, dataset.offsets):
        digest.update(np.ascontiguousarray(array).data)
    sources = [source for source in data.sources if source.key == f"data.{part}"]
    skipped = sum((Counter(source.skipped) for source in sources), Counter())
    return {
        "counts": {**dataclasses.asdict(dataset.counts), "skipped": dict(skipped)} if dataset.counts.rows else {},
        "tokens_sha256": digest.hexdigest(),
        "sources": [source_facts(source) for source in sources],
    }


def source_facts(source: SourceReport) -> Facts:
    """What one source came to, and which bytes it was."""
    counted = {**dataclasses.asdict(source.counts), "skipped": dict(source.skipped)}
    counts = counted if source.counts.rows else {}  # a stream is not counted
    files = [{"path": str(file.path), "bytes": file.bytes, "sha256": file.sha256} for file in source.files]
    hashes = [file.sha256 for file in source.files]
    own = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    named = {"name": source.path, "sha256": own, "format": source.format, "template": source.template}
    return {
        **named,
        "weight": source.weight,
        "license": source.license,
        "counts": counts,
        "skipped_first": list(source.skipped_first),
        "files": files,
    }


def session_facts(program: Program) -> Facts:
    """Where and on what this session runs."""
    device = program.mesh.devices.flat[0]
    return {
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": program.mesh.size,
            "processes": jax.process_count(),
            "mesh": {str(axis): size for axis, size in program.mesh.shape.items()},
            "strategy": program.strategy.name,
        },
        "versions": {
            "llmtune": llmtune.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def peak_memory() -> Facts:
    """Peak bytes of this process, and of its fullest device where the platform counts them."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    counted = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return {"peak_host_bytes": resident, "peak_device_bytes": max(counted, default=0) or None}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
