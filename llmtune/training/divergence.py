"""What a run does about steps that the jitted step found bad: it says so, goes back, or gives up with code 76.

    rows of metrics  -->  lines for a person, a rollback asked for, DivergedError

A pure function of the rows: every process sees the same ones and decides the same.
"""

from collections.abc import Callable
from typing import Any

from llmtune.config.divergence import Divergence
from llmtune.errors import LlmtuneDivergedError


class BadSteps:
    """Counts bad steps in a row. `say`: where a person reads a line."""

    def __init__(self, policy: Divergence, say: Callable[[str], None]):
        self._policy, self._say, self._in_a_row = policy, say, 0

    def see(self, row: dict[str, Any]) -> bool:
        """Whether this step asks for the last checkpoint's weights. Raises LlmtuneDivergedError where enough is enough."""
        step, policy = row["step"], self._policy
        spike = bool(row.get("spike")) and row["loss"] == row["loss"]
        skipped = bool(row.get("skipped"))
        if row.get("overflow"):
            return False  # float16 looks for its scale
        if not spike and not skipped:
            self._in_a_row = 0
            return False
        self._in_a_row += skipped
        seen = f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
        what = "a spike" if spike else "no numbers"
        if spike and policy.spikes == "stop":
            raise LlmtuneDivergedError(
                f"step {step}: a spike ({seen}), and divergence.spikes is stop; it was not applied, the last checkpoint is good"
            )
        if self._in_a_row >= policy.in_a_row:
            raise LlmtuneDivergedError(
                f"step {step}: {self._in_a_row} bad steps in a row ({what}: {seen}); none was applied and the last checkpoint is "
                "good; look at the data there, lower optimizer.learning_rate, or raise divergence.in_a_row"
            )
        back = spike and policy.spikes == "roll_back"
        did = "applied all the same" if not skipped else "gone back to the last checkpoint" if back else "skipped"
        self._say(f"step {step}: {what} ({seen}), {did}")
        return back
