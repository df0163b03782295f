"""Every key of a run with its type, default and help, as documentation and `--help` print them."""

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from llmtune.config.run import Run


def key_reference(kind: type = Run, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key path, type, default, help) of every key, sections followed by their keys.

    Of a section that is one of several methods, the keys of the default one; those of the others under `adapt[dora].`.
    """
    hints, rows = get_type_hints(kind), []
    for entry in fields(kind):
        path = f"{prefix}{entry.metadata.get('alias', entry.name)}"
        section = next((part for part in _parts(hints[entry.name]) if is_dataclass(part)), None)
        methods = entry.metadata.get("methods")
        if methods is not None:
            for number, (method, own) in enumerate(methods.items()):
                rows += key_reference(own, f"{path}[{method}]." if number else f"{path}.")
        elif section is not None:
            rows += key_reference(section, f"{path}.")  # type: ignore[arg-type]
        else:
            rows.append((path, _type_text(hints[entry.name]), _default_text(entry), entry.metadata["help"]))
            for item in _items(hints[entry.name]):
                rows += key_reference(item, f"{path}.[].")
    return rows


def _parts(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", None) or (hint,)


def _items(hint: Any) -> list[type]:
    """The sections that a list may hold."""
    lists = [part for part in _parts(hint) if getattr(part, "__origin__", None) is list]
    return [kind for part in lists for inner in _parts(part) for kind in _parts(inner) if is_dataclass(kind)]  # type: ignore[misc]


def _type_text(hint: Any) -> str:
    if type(None) in _parts(hint) and any(getattr(part, "__origin__", None) is Literal for part in _parts(hint)):
        return " or ".join(map(_type_text, _parts(hint)))
    if getattr(hint, "__origin__", None) is Literal:
        return " or ".join(map(str, hint.__args__))
    if hint is type(None):
        return "null"
    text = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", None) else str(hint)
    return re.sub(r"typing\.|llmtune\.config\.\w+\.", "", text).replace("None", "null")


def _default_text(entry: Field) -> str:
    value = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    if value is MISSING:
        return "required"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
