"""Reading single fields of a config.json: of the right type and range, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from llmtune.errors import LlmtuneFormatError


def positive(config: Mapping[str, Any], name: str, where: str, default: int | None = None, prefix: str = "") -> int:
    """A positive integer; absent and null are the default, or refused where that is None."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise wrong(where, prefix + name, value, "a positive integer")
    return value


def number(
    config: Mapping[str, Any], name: str, where: str, default: float | None, prefix: str = "", least: float = 0.0
) -> float:
    """A number above zero (or from `least` on, where that is positive)."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise wrong(where, prefix + name, value, "a positive number")
    if value < least:
        raise wrong(where, prefix + name, value, f"{least:g} or more")
    return float(value)


def coefficient(config: Mapping[str, Any], name: str, where: str, default: float) -> float:
    """A number from zero on."""
    value = config.get(name, default)
    return 0.0 if value == 0 and not isinstance(value, bool) else number(config, name, where, default)


def fraction(config: Mapping[str, Any], name: str, where: str) -> float:
    """A number in [0, 1); absent and null are 0."""
    value = config.get(name)
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise wrong(where, name, value, "a number from 0 on that is less than 1")
    return float(value)


def flag(config: Mapping[str, Any], name: str, where: str, default: bool = False, prefix: str = "") -> bool:
    """True or false; absent is the default."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise wrong(where, prefix + name, value, "true or false")
    return value


def token(config: Mapping[str, Any], name: str, where: str) -> int | None:
    """A token id, or None for absent, null and -1."""
    value = config.get(name)
    if value is not None and (type(value) is not int or value < -1):
        raise wrong(where, name, value, "a token id or null")
    return None if value == -1 else value


def wrong(where: str, name: str, value: Any, expected: str) -> LlmtuneFormatError:
    """The error that says which field of which file is what, and what is supported."""
    return LlmtuneFormatError(f"{where}: {name} is {short(value)}; supported: {expected}")


def short(value: Any) -> str:
    """A value as one printable line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
