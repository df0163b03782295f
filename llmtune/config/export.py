"""What exported models and adapters are called, and under which licence their base is: the keys under `export`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key


@dataclass(frozen=True)
class Export:
    """What the model card and provenance.json beside every export say. May change on resume."""

    name: str | None = key("of the model in its card; null: that of the run's directory, as the licence wants it", None)
    license: Literal["llama3", "llama3.1", "llama3.2", "llama3.3", "apache-2.0", "mit", "mrl", "mnpl"] | None = key(
        "of the base model; null: as its card or its licence file says", None
    )
    accept_license: bool = key("this use keeps to a licence that forbids commercial or production use", False)


def check_export(export: Export, require: Callable[[bool, str, str], None]) -> None:
    """Raises LlmtuneConfigError naming the key; `require(condition, path, said)` is how a run says it."""
    named = export.name is None or (export.name.strip() == export.name != "" and export.name.isprintable())
    require(named, "export.name", f"{export.name!r} is no name of one line")
