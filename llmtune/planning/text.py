"""Plans as tables in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtune.planning.plan import Plan, describe_mesh

GB, TERA = 1e9, 1e12


def print_plans(plans: Sequence[Plan], console: Console) -> None:
    """Memory, work, exchanges and time, one column for each plan, and the verdict below."""
    first = plans[0]
    console.print(
        Text(
            f"{first.run.model}, {first.run.train.batch_size} rows of {first.run.data.sequence_length:,} tokens a step, on "
            f"{first.topology.name} ({first.devices} devices)"
        )
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("per device")
    for plan in plans:
        table.add_column(f"{plan.strategy}\n{describe_mesh(plan.mesh)}", justify="right")
    for section, rows in sections(plans):
        table.add_row(Text(section, style="bold"))
        for name, cells in rows:
            table.add_row(f"  {name}", *cells)
    console.print(table)
    for plan in plans:
        console.print(Text(verdict(plan), style="green" if plan.fits else "red"))


def sections(plans: Sequence[Plan]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(section, rows of (name, a cell for each plan))."""
    memory = [
        ("weights", [_gb(p.state.weights) for p in plans]),
        ("adapters", [_gb(p.state.adapters) for p in plans]),
        ("optimizer state", [_gb(p.state.moments) for p in plans]),
        ("gradients, activations, temporaries", [_gb(p.compiled.peak - p.state.total) for p in plans]),
        ("peak", [_gb(p.compiled.peak) for p in plans]),
        ("memory of the device", [_gb(p.limit) for p in plans]),
    ]
    work = [
        ("model TFLOP", [f"{p.costs.model_flops / p.devices / TERA:,.1f}" for p in plans]),
        ("computed TFLOP", [f"{p.costs.computed_flops / p.devices / TERA:,.1f}" for p in plans]),
    ]
    kinds = sorted({(c.kind, c.axes) for p in plans for c in p.compiled.collectives})
    exchanged = [
        (f"{kind} over {axes}", [_exchange(p, kind, axes) for p in plans])
        for kind, axes in kinds
        if any(c.wire >= 1e6 for p in plans for c in p.compiled.collectives if (c.kind, c.axes) == (kind, axes))
    ]
    total = ("all", [_gb(sum(c.wire for c in p.compiled.collectives)) for p in plans])
    times = [
        ("compute", [_ms(p.roofline.compute) for p in plans]),
        ("memory", [_ms(p.roofline.memory) for p in plans]),
        ("chip interconnect", [_ms(p.roofline.ici) for p in plans]),
        ("data-center network", [_ms(p.roofline.dcn) for p in plans]),
        ("step, all overlapped", [_ms(p.roofline.overlapped) for p in plans]),
        ("step, exchanges apart", [_ms(p.roofline.apart) for p in plans]),
        ("MFU at most", [f"{p.roofline.mfu:.0%}" for p in plans]),
    ]
    return [
        ("memory, GB", memory),
        ("work of a step", work),
        ("exchanged in a step, GB on the wire", [*exchanged, total]),
        ("least time, ms", times),
    ]


def verdict(plan: Plan) -> str:
    """One sentence: fits, or by how much it does not."""
    room = plan.limit - plan.compiled.peak
    if plan.fits:
        return f"{plan.strategy}: fits, {_gb(room)} GB of {_gb(plan.limit)} GB to spare"
    return (
        f"{plan.strategy}: does not fit, {_gb(-room)} GB above the {_gb(plan.limit)} GB of a {plan.topology.chip.name}"
    )


def _exchange(plan: Plan, kind: str, axes: str) -> str:
    own = [c for c in plan.compiled.collectives if (c.kind, c.axes) == (kind, axes)]
    return f"{sum(c.count for c in own)} x, {_gb(sum(c.wire for c in own))}" if own else "-"


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds else "-"
