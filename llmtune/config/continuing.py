"""Which earlier run a run goes on from, with other data or another schedule: the keys under `continue_from`."""

from collections.abc import Callable
from dataclasses import dataclass

from llmtune.config.key import key


@dataclass(frozen=True)
class Continuing:
    """The weights of an earlier run's checkpoint, where this run begins. `continue_from: RUN` is short for its newest one."""

    run: str = key("directory of the earlier run: same model, same adapt, anything else as you like")
    step: int | None = key("which of its checkpoints; null: the newest", None)


def continuing_of(given: "str | Continuing | None") -> Continuing | None:
    """The section, also where a path stands for it."""
    return Continuing(given) if isinstance(given, str) else given


def check_continuing(given: "str | Continuing | None", output: str, require: Callable[[bool, str, str], None]) -> None:
    """Raises LlmtuneConfigError naming the key; `require(condition, path, said)` is how a run says it."""
    own = continuing_of(given)
    if own is None:
        return
    require(bool(own.run), "continue_from", "no run is given")
    require(own.step is None or own.step > 0, "continue_from.step", f"{own.step} must be positive")
    same = own.run.rstrip("/") == output.rstrip("/")
    require(not same, "continue_from", "is the run's own output; leave it out to resume, or choose another output")
