"""Figures as people read them: three significant digits, thousands set apart, units."""

import math
from collections.abc import Sequence
from typing import Any

MINUS, GLUE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
CONFIDENCE = f"95{GLUE}%{GLUE}CI"


def figure(value: float, like: float | None = None) -> str:
    """`33.1`, `7.62`, `1,240`, `0.0132`; with as many decimals as `like` would have."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else ("\N{INFINITY}" if value > 0 else f"{MINUS}\N{INFINITY}")
    size = abs(value if like is None else like)
    if size >= 1000:
        value = round(value, 2 - math.floor(math.log10(max(abs(value), 1.0))))
    decimals = 0 if size >= 100 else 2 if size == 0 else min(6, max(0, 2 - math.floor(math.log10(size))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def span(bounds: Sequence[float] | None, like: float) -> str:
    """`30.2\N{EN DASH}36.4`, in the decimals of `like`; empty without bounds."""
    if bounds is None:
        return ""
    low, high = (figure(bound, like) for bound in bounds)
    dash = " to " if MINUS in low + high else "\N{EN DASH}"
    return f"{low}{dash}{high}"


def count(number: int | float, noun: str = "") -> str:
    """`7,473 rows`, `1 row` (of `noun` row)."""
    text = f"{int(number):,}"
    return f"{text} {noun}{'' if int(number) == 1 else 's'}" if noun else text


def share(part: float, whole: float) -> str:
    """`3.2 %`; `< 0.1 %` rather than nothing."""
    percent = 100 * part / max(whole, 1)
    return "< 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def factor(value: float) -> str:
    """`6.2 % lower`, `1.4 % higher`, `133 times lower`."""
    way = "lower" if value < 1 else "higher"
    if 0.5 < value < 2:
        return f"{100 * abs(value - 1):.1f} % {way}"
    return f"{figure(max(value, 1 / value) if value else math.inf)} times {way}"


def duration(seconds: float) -> str:
    """`820 ms`, `4.2 s`, `48 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"


def size(number: float) -> str:
    """Bytes: `812 MB`, `1.42 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def parameters(number: float) -> str:
    """`8.03 B`, `42.1 M`, `260 k`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def listed(value: Any) -> str:
    """A value of the configuration: `none`, `true`, the items of a list on lines of their own, what is set of a section."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case list():
            return "\n".join(map(listed, value)) if value else "none"
        case dict():
            given = {key: own for key, own in value.items() if own is not None and (key, own) != ("weight", 1)}
            path = given.pop("path", None)
            told = [
                f"{key}: {{{listed(own)}}}" if isinstance(own, dict) else f"{key}: {own}" for key, own in given.items()
            ]
            return ", ".join([*([] if path is None else [str(path)]), *told]) or "none"
    return str(value)
