"""`llmtune plan`: does a run fit on devices that are not here, what will it spend its time on, which layout is best.

llmtune plan CONFIG.yaml --topology v5e:16x16
llmtune plan CONFIG.yaml --topology v5p-128 --strategies fsdp,tensor
llmtune plan CONFIG.yaml --topology v5p-128 --search --write planned.yaml
"""

import argparse
import os
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneConfigError


def add_plan(commands: Any) -> None:
    """The parser of the command."""
    plan = commands.add_parser(
        "plan",
        help="whether a run fits on devices that are not here, and what a step of it takes",
        description="Compile the train step of a run for a topology that need not be here, and say what it takes: memory, "
        "FLOPs, exchanges, the least time of a step. No data and no weights are read.",
        usage="llmtune plan CONFIG.yaml --topology NAME [--strategies A,B | --search] [--section.key VALUE ...]",
    )
    plan.add_argument("config", metavar="CONFIG.yaml", help="the run, as for llmtune train")
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="v5e:16x16, v5p-128, v5p:4x4x4*2 (two slices), h100:8, ..."
    )
    plan.add_argument(
        "--strategies", default=None, metavar="A,B", help="compared side by side; default: the run's own strategy"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="try every mesh, remat policy and number of microbatches; compile the best",
    )
    plan.add_argument(
        "--write", default=None, metavar="FILE", help="the best plan as a configuration for llmtune train"
    )
    plan.add_argument(
        "--quick", action="store_true", help="stop each compilation before machine code: the same figures, much sooner"
    )
    plan.add_argument("--json", default=None, metavar="FILE", help="all figures as data")
    plan.add_argument(
        "--html", default=None, metavar="FILE", help="the plans side by side on a page that needs no network"
    )
    plan.add_argument("--fresh", action="store_true", help="compile again what was compiled before")
    plan.set_defaults(run=_plan, takes_overrides=True)


def _plan(options: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, and devices that are here stay free
    from rich.console import Console

    from llmtune.config.file import load_run
    from llmtune.planning.ahead import assign_step, compile_step
    from llmtune.planning.cache import cached
    from llmtune.planning.candidates import rank
    from llmtune.planning.mend import mend
    from llmtune.planning.plan import plan_run
    from llmtune.planning.record import write_json
    from llmtune.planning.report import write_page
    from llmtune.planning.search import search, write_layout
    from llmtune.planning.text import print_plans, verdict
    from llmtune.planning.topology import parse_topology

    for option in ("json", "html", "write"):
        _require_folder(option, getattr(options, option))
    topology = parse_topology(options.topology)
    run = load_run(options.config, list(options.overrides))
    strategies = [name.strip() for name in options.strategies.split(",")] if options.strategies else []
    progress, console = Console(stderr=True, highlight=False, soft_wrap=True), Console(highlight=False)

    def note(line: str) -> None:
        progress.print(line, markup=False)

    compile_layout = assign_step if options.quick else compile_step
    compile_layout = compile_layout if options.fresh else cached(compile_layout)
    plans = (search if options.search else plan_run)(run, topology, strategies, compile_layout, note)
    print_plans(plans, console)
    if not any(plan.fits for plan in plans):
        mended = mend(min(plans, key=lambda plan: plan.needed), compile_layout, note)
        if mended is None:
            console.print("no change that was tried makes it fit")
        else:
            console.print(f"the nearest change that fits: {mended.change}\n{verdict(mended.plan)}", markup=False)
            plans = [*plans, mended.plan]
    if options.json is not None:
        write_json(plans, Path(options.json))
    if options.html is not None:
        write_page(plans, Path(options.html))
        console.print(f"page: {options.html}", markup=False)
    if options.write is not None:
        fitting = [plan for plan in plans if plan.fits]
        if not fitting:
            raise LlmtuneConfigError(f"--write: nothing fits, and {options.write} is not written")
        write_layout(min(fitting, key=lambda plan: rank(plan.times)), Path(options.write))
        console.print(f"written: {options.write}", markup=False)
    return 0


def _require_folder(option: str, path: str | None) -> None:
    """Before minutes of compiling."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise LlmtuneConfigError(f"--{option}: {path} is no file in a folder that exists")
