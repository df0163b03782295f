"""How a configuration declares one key: a dataclass field that carries its help text."""

import copy
from dataclasses import MISSING, field, is_dataclass
from typing import Any


def key(help: str, default: Any = MISSING, **options: Any) -> Any:
    """A dataclass field with its help text."""
    metadata = {"help": help, **options}
    if isinstance(default, (dict, list)) or is_dataclass(default):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
