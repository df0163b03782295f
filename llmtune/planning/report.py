"""Plans side by side on one page that needs no network: bars of memory against what the device has, stacks of time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from llmtune.planning.layout import describe_mesh, device_count
from llmtune.planning.plan import Plan
from llmtune.planning.text import amount, sections, verdict

TEMPLATES = Path(__file__).parent / "templates"
TIMES = (("compute", "compute"), ("memory", "memory"), ("chip interconnect", "ici"), ("data-center network", "dcn"))


def write_page(plans: Sequence[Plan], path: Path) -> None:
    """The page of these plans."""
    path.write_text(page(plans), encoding="utf-8")


def page(plans: Sequence[Plan]) -> str:
    """HTML of these plans."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    layout = plans[0].layout
    run = layout.run
    subtitle = (
        f"{run.train.batch_size} rows of {run.data.sequence_length:,} tokens a step on {layout.topology.name} "
        f"({device_count(layout.sizes)} devices)"
    )
    return environment.get_template("plan.html").render(
        title=run.model,
        subtitle=subtitle,
        plans=[_plan(plan) for plan in plans],
        memory=memory_bars(plans),
        time=time_bars(plans),
        parts=[name for name in plans[0].memory if any(plan.memory[name] for plan in plans)],
        kinds=[name for name, own in TIMES if any(getattr(plan.times, own) for plan in plans)],
        sections=sections(plans),
        source=layout.topology.chip.source,
    )


def memory_bars(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """A bar for each plan: its parts and the device's limit, in hundredths of the longest."""
    longest = max(max(plan.needed, plan.limit) for plan in plans)
    return [
        {
            "name": _name(plan),
            "fits": plan.fits,
            "parts": [
                {"name": name, "share": 100 * size / longest, "text": f"{amount(size / 1e9, 2)} GB"}
                for name, size in plan.memory.items()
            ],
            "limit": 100 * plan.limit / longest,
            "text": f"{amount(plan.needed / 1e9, 2)} of {plan.limit / 1e9:,.2f} GB",
        }
        for plan in plans
    ]


def time_bars(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """For each plan the parts of its time beneath each other, in hundredths of the longest: they may overlap."""
    longest = max(plan.times.apart for plan in plans)
    return [
        {
            "name": _name(plan),
            "parts": [
                {
                    "name": name,
                    "share": 100 * getattr(plan.times, own) / longest,
                    "text": f"{amount(1e3 * getattr(plan.times, own), 1)} ms",
                }
                for name, own in TIMES
            ],
            "text": f"{amount(1e3 * plan.times.overlapped, 1)} to {amount(1e3 * plan.times.apart, 1)} ms, MFU at most "
            f"{plan.times.mfu:.0%}",
        }
        for plan in plans
    ]


def _plan(plan: Plan) -> dict[str, Any]:
    kernels = () if plan.compiled is None else plan.compiled.kernels
    return {"name": _name(plan), "fits": plan.fits, "verdict": verdict(plan), "kernels": ", ".join(kernels)}


def _name(plan: Plan) -> str:
    train = plan.layout.run.train
    pieces = f", {train.microbatches} microbatches" if train.microbatches > 1 else ""
    return f"{plan.layout.strategy.name}: {describe_mesh(plan.layout.sizes)}, remat {train.remat}{pieces}"
