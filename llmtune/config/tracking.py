"""Where the figures of a run go besides its own directory: the keys under `tracking`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key


@dataclass(frozen=True)
class Tracking:
    """metrics.jsonl and TensorBoard's events are always written; services are asked for. May change on resume."""

    to: list[Literal["wandb", "mlflow", "trackio"]] = key("services that get the rows too (extras: track, trackio)", [])
    project: str = key("under which they list the run", "llmtune")
    name: str | None = key("of the run there; null: that of its directory", None)
    offline: bool = key("what they keep stays in the run's directory: nothing is sent", False)


def check_tracking(tracking: Tracking, require: Callable[[bool, str, str], None]) -> None:
    """Raises LlmtuneConfigError naming the key; `require(condition, path, said)` is how a run says it."""
    require(len(set(tracking.to)) == len(tracking.to), "tracking.to", "a service is named twice")
    for name, given in (("project", tracking.project), ("name", tracking.name)):
        require(given is None or bool(given.strip()), f"tracking.{name}", "is empty; give a name, or leave it out")
