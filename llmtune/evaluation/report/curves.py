"""Metrics as inline SVG: small, sharp, text as text, in colours that follow the reader's light or dark scheme.

matplotlib draws with stand-in colours, which are then replaced by CSS variables; ids are made unique to the page, and what an
SVG file needs but a page does not (prolog, metadata, namespaces) is taken out.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.evaluation.report.record import Record

INK, GRID = "#010101", "#010102"  # stand-ins, replaced by variables of the page
SERIES = {
    f"#0102{n:02d}": f"--{name}" for n, name in enumerate(("first", "second", "third", "fourth", "fifth", "sixth"))
}
FIRST, SECOND, *_ = SERIES
VARIABLES = {INK: "var(--soft)", GRID: "var(--line)", **{own: f"var({name})" for own, name in SERIES.items()}}
LEFT, RIGHT, BELOW, ABOVE = 46, 12, 34, 8  # margins: fixed, so that drawings line up (and fitting them takes a while)
ROUND = [1, 2, 2.5, 5, 10]  # ticks are at multiples of these
LOGARITHMIC = 15  # a loss that falls by more than this factor is drawn over a logarithmic axis
DOTS = 60  # more would run into each other: a line alone
POINTS = 300  # more than that many steps are averaged in groups: a page needs no more dots than it has pixels
WIDTH, HEIGHT, TEXT = 380, 210, 10  # of the drawing, in units of its own; a phone shows them one to one
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmtune",
    "font.size": TEXT,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True)
class Curve:
    """Steps and values, in one of the stand-in colours.

    `faint`: behind the others; `dots`: measured now and then; `dashed`: so that what it covers shows.
    """

    steps: np.ndarray
    values: np.ndarray
    colour: str
    faint: bool = False
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and legend, `(colour variable, label)`, which are text of the page."""

    title: str
    legend: tuple[tuple[str, str], ...]
    svg: str


def run_charts(record: Record) -> list[Chart]:
    """Loss, and that of each source; learning rate; gradient norm, and that of each part; throughput; none without a step."""
    if not record.rows:
        return []
    noisy, smooth = loss_curves(record, FIRST)
    evaluation = Curve(*record.evaluation_curve(), SECOND, dots=True)
    measured = [evaluation] if len(evaluation.steps) else []
    legend = (("--first", "training"), ("--second", "held out"))[: 1 + len(measured)]
    return [
        Chart("Loss, nats per token", legend, draw("loss", [noisy, smooth, *measured])),
        *several(record, "Training loss by source, running mean", "loss/", "source"),
        Chart("Learning rate", (), draw("rate", [metric(record, "learning_rate", FIRST)], zero=True)),
        Chart("Gradient norm before clipping", (), draw("norm", [metric(record, "grad_norm", FIRST)], zero=True)),
        *several(record, "Gradient norm by part, running mean", "grad_norm/", "part", zero=True),
        Chart("Tokens per second", (), draw("speed", [metric(record, "tokens_per_second", FIRST)], zero=True)),
        *(
            [Chart("Model FLOPs, share of the chip's peak", (), draw("mfu", [metric(record, "mfu", FIRST)], zero=True))]
            if len(record.series("mfu")[0])
            else []
        ),
    ]


def several(record: Record, title: str, prefix: str, name: str, zero: bool = False) -> list[Chart]:
    """One chart of all metrics whose names begin so, as many as there are colours; none where there is at most one."""
    names = record.names_after(prefix)[: len(SERIES)]
    if len(names) < 2:
        return []
    curves = []
    for own, colour in zip(names, SERIES, strict=False):
        steps, values = record.series(prefix + own)
        curves.append(Curve(steps, running_mean(values, max(1, len(steps) // 25)), colour))
    legend = tuple(zip(SERIES.values(), names, strict=False))
    return [Chart(title, legend, draw(name, curves, zero=zero))]


def comparison_charts(one: Record, other: Record) -> list[Chart]:
    """The same of two runs, laid over each other."""
    if not one.rows and not other.rows:
        return []
    pairs = ((one, FIRST), (other, SECOND))
    legend = (("--first", f"A: {one.name}"), ("--second", f"B: {other.name}"))

    def both(name: str) -> list[Curve]:
        return [Curve(*record.series(name), colour, dashed=colour == SECOND) for record, colour in pairs]

    losses = [curve for record, colour in pairs for curve in loss_curves(record, colour)]
    held_out = [Curve(*record.evaluation_curve(), colour, dots=True) for record, colour in pairs]
    charts = [Chart("Training loss, nats per token", legend, draw("loss", losses))]
    if any(len(curve.steps) for curve in held_out):
        charts.append(Chart("Held-out loss, nats per token", legend, draw("held-out", held_out)))
    return [
        *charts,
        Chart("Learning rate", legend, draw("rate", both("learning_rate"), zero=True)),
        Chart("Tokens per second", legend, draw("speed", both("tokens_per_second"), zero=True)),
    ]


def loss_curves(record: Record, colour: str) -> tuple[Curve, Curve]:
    """The loss of every step, faint, and its running mean."""
    steps, losses = record.series("loss")
    window = max(1, len(steps) // 25)
    return Curve(steps, losses, colour, faint=True), Curve(steps, running_mean(losses, window), colour)


def metric(record: Record, name: str, colour: str) -> Curve:
    """One metric of every step."""
    return Curve(*record.series(name), colour)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over up to `window` values around each, shorter at the ends; what is not finite is left out."""
    finite = np.isfinite(values)
    kernel = np.ones(min(window, max(len(values), 1)))
    if not len(values):
        return values
    sums = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    counts = np.convolve(finite.astype(np.float64), kernel, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of equal groups of steps."""
    if len(steps) <= POINTS:
        return steps, values
    starts = np.arange(POINTS) * len(steps) // POINTS
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def draw(name: str, curves: Sequence[Curve], zero: bool = False) -> str:
    """The drawing alone; `name` makes its ids unique, `zero` lets the axis begin there."""
    import matplotlib  # here, for it takes a while to import
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((LEFT / WIDTH, BELOW / HEIGHT, 1 - (LEFT + RIGHT) / WIDTH, 1 - (BELOW + ABOVE) / HEIGHT))
        for curve in curves:
            _plot(axes, curve)
        if zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
        if not zero and spread(curves) > LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}".replace("-", "\N{MINUS SIGN}"))
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), name)


def spread(curves: Sequence[Curve]) -> float:
    """Largest over smallest value; 0 where one is not positive."""
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    return float(values.max() / values.min()) if len(values) and values.min() > 0 else 0.0


def _plot(axes: Any, curve: Curve) -> None:
    steps, values = thinned(curve.steps, curve.values)
    values = np.where(np.isfinite(values), values, np.nan)
    if curve.dots:
        marker = "o" if len(steps) <= DOTS else ""
        axes.plot(steps, values, color=curve.colour, linewidth=1.6, marker=marker, markersize=3.6)
    elif curve.faint:
        axes.plot(steps, values, color=curve.colour, linewidth=0.8, alpha=0.35)
    else:
        axes.plot(steps, values, color=curve.colour, linewidth=1.6, linestyle=(0, (4, 2)) if curve.dashed else "-")


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|font-family: [^;]*; ", "", svg, flags=re.DOTALL
    )
    svg = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"font: [^;\"]*", f"font-size: {TEXT}px", svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg", f'<svg width="{WIDTH}" height="{HEIGHT}" aria-hidden="true"', 1)
