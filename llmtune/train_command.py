"""`llmtune train`: the run of a YAML file, by one process or by several, supervised or not.

llmtune train CONFIG.yaml [--section.key VALUE ...]
llmtune train CONFIG.yaml --supervise [--processes N]                           all on this machine
llmtune train CONFIG.yaml --processes N --process I --coordinator HOST:PORT     on each of N machines
llmtune train CONFIG.yaml --processes auto                                      on a TPU pod, under Slurm, MPI, Kubernetes
"""

import argparse
import contextlib
import functools
import logging
import sys
import threading
from pathlib import Path
from typing import Any

from llmtune import exit_codes
from llmtune.errors import LlmtuneConfigError
from llmtune.failures import tell


def add_train(commands: Any) -> None:
    """The parser of the command."""
    train = commands.add_parser(
        "train",
        help="fine-tune a model as a YAML file says",
        description="Fine-tune a model as a YAML file says. The same command on its own run directory resumes it.",
        usage="llmtune train CONFIG.yaml [--section.key VALUE ...] [--supervise] [--processes N]",
        epilog=_keys_epilog,  # type: ignore[arg-type]
        formatter_class=_LazyEpilog,
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="the run; configs/recipes holds examples")
    train.add_argument(
        "--supervise",
        action="store_true",
        help="start the run again when something around it ends it (docs/reliability.md)",
    )
    train.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="R",
        help="with --supervise: give up after so many in a row without a new checkpoint; default 3",
    )
    train.add_argument(
        "--processes",
        default=None,
        metavar="N",
        help="of one run: with --supervise all on this machine; auto: those of a TPU pod or of a Slurm, MPI or Kubernetes job",
    )
    train.add_argument("--process", type=int, default=None, metavar="I", help="which of the N this is, from 0")
    train.add_argument("--coordinator", default=None, metavar="HOST:PORT", help="of process 0, a free port there")
    train.add_argument(
        "--profile",
        default=None,
        metavar="FIRST:LAST",
        help="trace these steps into profile/ of the run (docs/tracking.md)",
    )
    train.set_defaults(
        run=_train, takes_overrides=True, interrupted="; the same command resumes from the last checkpoint"
    )


class _LazyEpilog(argparse.RawDescriptionHelpFormatter):
    """Builds the list of keys only when help is asked for."""

    def add_text(self, text: object) -> None:
        super().add_text(text() if callable(text) else text)  # type: ignore[arg-type]


def _keys_epilog() -> str:
    from llmtune.config import key_reference

    lines = ["keys of CONFIG.yaml (type, default, meaning):"]
    for path, kind, default, text in key_reference():
        lines += [f"  {path}  ({kind}; default {default})", f"      {text}"]
    return "\n".join(lines)


def _train(options: argparse.Namespace) -> int:
    from llmtune.config.file import load_run
    from llmtune.training.stopping import on_signals

    run = load_run(options.config, list(options.overrides))
    processes = _processes(options)
    profile = None if options.profile is None else _steps(options.profile)
    with on_signals() as stop:
        if options.supervise:
            from llmtune.training.supervisor import Supervisor

            arguments, grace = _passed_on(options), run.safeguards.heartbeat_seconds + 10
            say = functools.partial(print, flush=True)  # between the lines of its processes
            return Supervisor(arguments, Path(run.output), processes or 1, options.restarts, grace, say).run(stop)
        from llmtune.training.joining import Place, end_with_parent, ending_at_once, join
        from llmtune.training.loop import train

        end_with_parent()
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs whole tracebacks of what it then raises
        threading.excepthook = lambda _: None  # likewise
        sys.unraisablehook = _print_unraisable
        alone = options.processes is None or processes == 1
        place = Place(options.coordinator, processes, options.process)
        guards = run.safeguards
        with contextlib.ExitStack() as together:
            if not alone:
                together.enter_context(ending_at_once(functools.partial(tell, interrupted=options.interrupted)))
                together.enter_context(join(place, guards.heartbeat_seconds, guards.join_seconds))
            train(run, stop=stop, profile=profile)
    return exit_codes.DONE


def _steps(text: str) -> range:
    from llmtune.training.profiling import parse_steps  # here, for jax comes with it

    return parse_steps(text)


def _passed_on(options: argparse.Namespace) -> list[str]:
    """What the processes of a supervised run are told."""
    profile = [] if options.profile is None else ["--profile", options.profile]
    return [options.config, *profile, *options.overrides]


def _processes(options: argparse.Namespace) -> int | None:
    """How many were asked for; None for auto, and where nothing was said. Refuses what does not go together."""
    given = options.processes
    if given in (None, "auto"):
        if given is None and (options.process, options.coordinator) != (None, None):
            raise LlmtuneConfigError("--process and --coordinator belong to --processes N; add it")
        if given is not None and options.supervise:
            raise LlmtuneConfigError("--supervise starts the processes of this machine: give their number, not auto")
        return None
    if not given.isdecimal() or int(given) < 1:
        raise LlmtuneConfigError(f"--processes: {given!r} is no number of processes; give 1 or more, or auto")
    count = int(given)
    if options.supervise and (options.process, options.coordinator) != (None, None):
        raise LlmtuneConfigError("--supervise chooses --process and --coordinator itself; leave them out")
    if not options.supervise and count > 1:
        if options.process is None or options.coordinator is None:
            raise LlmtuneConfigError(
                "--processes N needs --process I and --coordinator HOST:PORT, or --supervise on one machine"
            )
        if not 0 <= options.process < count:
            raise LlmtuneConfigError(f"--process: {options.process} must lie in 0..{count - 1}")
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise LlmtuneConfigError(f"--coordinator: {options.coordinator!r} is not HOST:PORT, such as 10.0.0.1:8476")
    return count


def _print_unraisable(found: Any) -> None:
    """As ever, but for what each part of a failed save calls after it into the event loop that it has lost."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)
