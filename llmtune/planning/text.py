"""Plans as tables in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtune.planning.layout import describe_mesh, device_count
from llmtune.planning.plan import Plan

GB, TERA = 1e9, 1e12
Rows = list[tuple[str, list[str]]]  # (name, a cell for each plan)


def print_plans(plans: Sequence[Plan], console: Console) -> None:
    """Memory, work, exchanges and time, one column for each plan, and the verdict below."""
    layout = plans[0].layout
    run, count = layout.run, device_count(layout.sizes)
    rows = f"{run.train.batch_size} rows of {run.data.sequence_length:,} tokens a step"
    console.print(Text(f"{run.model}, {rows}, on {layout.topology.name} ({count} devices)"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("per device", no_wrap=True)
    for plan in plans:
        table.add_column(heading(plan), justify="right")
    for section, lines in sections(plans):
        table.add_row(Text(section, style="bold"))
        for name, cells in lines:
            table.add_row(f"  {name}", *cells)
    console.print(table)
    for plan in plans:
        console.print(Text(verdict(plan), style="green" if plan.fits else "red"), soft_wrap=True)


def heading(plan: Plan) -> str:
    """The strategy, its mesh and what else differs between plans of a search."""
    train = plan.layout.run.train
    pieces = f", {train.microbatches} microbatches" if train.microbatches > 1 else ""
    return f"{plan.layout.strategy.name}\n{describe_mesh(plan.layout.sizes)}\nremat {train.remat}{pieces}"


def sections(plans: Sequence[Plan]) -> list[tuple[str, Rows]]:
    """(section, its rows), for the terminal and for the page."""
    memory = [(name, [_gb(plan.memory[name]) for plan in plans]) for name in plans[0].memory]
    memory += [
        ("needed in all", [_gb(plan.needed) for plan in plans]),
        ("the device has", [_gb(plan.limit) for plan in plans]),
        ("estimated before compiling", [_gb(plan.layout.memory.total) for plan in plans]),
    ]
    if any(plan.compiled is not None and plan.compiled.alive is not None for plan in plans):
        memory.insert(-2, ("alive at one time", [_alive(plan) for plan in plans]))
    if any(plan.layout.memory.host for plan in plans):
        memory.append(("in the host's memory, for each device", [_gb(plan.layout.memory.host) for plan in plans]))
    costs = [(plan.layout.costs, device_count(plan.layout.sizes)) for plan in plans]
    work = [
        ("model TFLOP", [amount(own.model_flops / count / TERA, 1) for own, count in costs]),
        ("computed TFLOP", [amount(own.computed_flops / count / TERA, 1) for own, count in costs]),
    ]
    kinds = sorted({(own.kind, own.axes) for plan in plans for own in plan.exchanged if own.wire >= 1e6})
    exchanged = [(f"{kind} over {axes}", [_exchange(plan, kind, axes) for plan in plans]) for kind, axes in kinds]
    exchanged += [("all", [_gb(sum(own.wire for own in plan.exchanged)) for plan in plans])]
    return [
        ("memory, GB", memory),
        ("work of a step", work),
        ("exchanged in a step, GB on the wire", exchanged),
        ("least time, ms", _times(plans)),
    ]


def _times(plans: Sequence[Plan]) -> Rows:
    times = [plan.times for plan in plans]
    return [
        ("compute", [_ms(own.compute) for own in times]),
        ("memory", [_ms(own.memory) for own in times]),
        ("chip interconnect", [_ms(own.ici) for own in times]),
        ("data-center network", [_ms(own.dcn) for own in times]),
        ("step, all overlapped", [_ms(own.overlapped) for own in times]),
        ("step, exchanges apart", [_ms(own.apart) for own in times]),
        ("tokens/s at most", [f"{plan.tokens_per_second:,.0f}" for plan in plans]),
        ("MFU at most", [f"{own.mfu:.0%}" for own in times]),
    ]


def verdict(plan: Plan) -> str:
    """One sentence: fits, or by how much it does not."""
    name, room = plan.layout.strategy.name, plan.limit - plan.needed
    by = (
        ""
        if plan.compiled is not None
        else ", by estimate alone: no compiler for this chip is installed (pip install 'llmtune[plan-gpu]')"
    )
    if plan.fits:
        return f"{name}: fits, {_gb(room)} GB of {_gb(plan.limit)} GB to spare{by}"
    return f"{name}: does not fit, {_gb(-room)} GB above the {_gb(plan.limit)} GB of a {plan.layout.topology.chip.name}{by}"


def _alive(plan: Plan) -> str:
    return "-" if plan.compiled is None or plan.compiled.alive is None else _gb(plan.compiled.alive)


def _exchange(plan: Plan, kind: str, axes: str) -> str:
    own = [c for c in plan.exchanged if (c.kind, c.axes) == (kind, axes)]
    return f"{sum(c.count for c in own)} x, {_gb(sum(c.wire for c in own))}" if own else "-"


def _gb(size: float) -> str:
    return amount(size / GB, 2)


def _ms(seconds: float) -> str:
    return amount(seconds * 1e3, 1) if seconds else "-"


def amount(value: float, places: int) -> str:
    """So many decimals, and of what would then be nothing two digits: small models have plans too."""
    return f"{value:,.{places}f}" if value == 0 or abs(value) >= 10**-places else f"{value:.2g}"
