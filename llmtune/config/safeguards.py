"""When a run is taken for hung or lost: the keys under `safeguards`."""

from collections.abc import Callable
from dataclasses import dataclass

from llmtune.config.key import key

LONGEST = 10**6  # seconds, eleven days: what waits longer waits for ever


@dataclass(frozen=True)
class Safeguards:
    """When a run is taken for hung or lost, and ended so that it can be started again."""

    hang_seconds: float | None = key(
        "without a finished step for so long (and for 20 usual steps), the stacks of all threads are written down and the run "
        "ends with code 70; null: it waits for ever",
        300.0,
    )
    heartbeat_seconds: float = key(
        "without a sign of life from another process for so long, a run of several ends with code 75", 10.0
    )
    join_seconds: float = key(
        "where the processes of a run are not all there within so long, each says what to check and ends with code 75",
        300.0,
    )


def check_safeguards(safeguards: Safeguards, require: Callable[[bool, str, str], None]) -> None:
    """Raises LlmtuneConfigError naming the key."""
    for name in ("hang_seconds", "heartbeat_seconds", "join_seconds"):
        value = getattr(safeguards, name)
        require(value is None or value > 0, f"safeguards.{name}", f"{value} must be positive")
        require(value is None or value <= LONGEST, f"safeguards.{name}", f"{value} is more than {LONGEST} seconds")
