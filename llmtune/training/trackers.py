"""The trackers of one run: metrics.jsonl, which the report reads, TensorBoard, and the services that were asked for."""

import contextlib
from collections.abc import Callable, Iterator

from llmtune.config import Run
from llmtune.config.file import flat, plain
from llmtune.redaction import redact_tree
from llmtune.tracking import All, Place, TensorBoard, Tracker, open_services
from llmtune.training.processes import is_first
from llmtune.training.profiling import Profiler
from llmtune.training.run_directory import RunDirectory


@contextlib.contextmanager
def open_trackers(
    run: Run, directory: RunDirectory, after: int, say: Callable[[str], None], profile: range | None = None
) -> Iterator[Tracker]:
    """The trackers of a run that goes on after step `after`: what its files hold of later steps is cut or forgotten.

    In all processes but the first there are none. `profile`: the steps that are traced.
    """
    if not is_first():
        yield All(())
        return
    directory.metrics.cut_after(after)
    for kept in (directory.samples, directory.positions):
        if kept.path.exists():
            kept.cut_after(after)
    asked, config = run.tracking, redact_tree(flat(plain(run)))
    place = Place(directory.path, asked.project, asked.name or directory.path.name, config, after, asked.offline)
    files = (directory.metrics, TensorBoard(directory.tensorboard, after))
    traces = () if profile is None else (Profiler(profile, directory.profile, after),)
    tracker = All((*traces, *files, *open_services(asked.to, place, say)))
    try:
        yield tracker
    finally:
        tracker.close()
