"""`llmtune plan`: does a run fit on devices that are not here, what will it spend its time on, which layout is best.

llmtune plan CONFIG.yaml --topology v5e:16x16
llmtune plan CONFIG.yaml --topology v5p-128 --strategies fsdp,tensor
"""

import argparse
import os
from typing import Any


def add_plan(commands: Any) -> None:
    """The parser of the command."""
    plan = commands.add_parser(
        "plan",
        help="whether a run fits on devices that are not here, and what a step of it takes",
        description="Compile the train step of a run for a TPU topology that need not be here, and say what it takes: memory, "
        "FLOPs, exchanges, the least time of a step. No data and no weights are read.",
        usage="llmtune plan CONFIG.yaml --topology NAME [--strategies A,B] [--section.key VALUE ...]",
    )
    plan.add_argument("config", metavar="CONFIG.yaml", help="the run, as for llmtune train")
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="v5e:16x16, v5p-128, v5p:4x4x4*2 (two slices), h100:8, ..."
    )
    plan.add_argument(
        "--strategies", default=None, metavar="A,B", help="compared side by side; default: the run's own strategy"
    )
    plan.set_defaults(run=_plan, takes_overrides=True)


def _plan(options: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, and devices that are here stay free
    from rich.console import Console

    from llmtune.config.file import load_run
    from llmtune.planning.plan import plan_run
    from llmtune.planning.text import print_plans
    from llmtune.planning.topology import parse_topology

    topology = parse_topology(options.topology)
    run = load_run(options.config, list(options.overrides))
    strategies = [name.strip() for name in options.strategies.split(",")] if options.strategies else []
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    plans = plan_run(run, topology, strategies, lambda line: progress.print(line, markup=False))
    print_plans(plans, Console(highlight=False))
    return 0
