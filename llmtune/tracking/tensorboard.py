"""TensorBoard's event files, beside metrics.jsonl."""

from pathlib import Path
from typing import final

from llmtune.tracking.tracker import Row

FLUSH_SECONDS = 10  # what a killed run may miss here; metrics.jsonl misses nothing


@final
class TensorBoard:
    """Scalars of every step: `train/...`, and `evaluation/...` where there was one."""

    def __init__(self, directory: Path, after: int):
        from tensorboardX import SummaryWriter  # here, for it takes a while to import

        # purge_step: TensorBoard forgets what an earlier session wrote from that step on
        self._writer = SummaryWriter(str(directory), purge_step=after + 1, flush_secs=FLUSH_SECONDS)

    def log(self, row: Row) -> None:
        """A scalar for each number but the step."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(scalar_name(name), value, row["step"])

    def close(self) -> None:
        """Write what is held back."""
        self._writer.close()


def scalar_name(name: str) -> str:
    """`loss` -> `train/loss`, `eval_loss` -> `evaluation/loss`."""
    return f"evaluation/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
