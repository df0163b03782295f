"""Weights & Biases. Its id lies in the run's directory, so that a run taken up again goes on in the same place.

Steps that are done a second time after an interruption appear twice there: its history takes no row back.
"""

import importlib
import uuid
from typing import final

from llmtune.tracking.tensorboard import scalar_name
from llmtune.tracking.tracker import Place, Row


@final
class Wandb:
    """A run of W&B; offline it lies in wandb/, for `wandb sync`."""

    def __init__(self, place: Place):
        wandb = importlib.import_module("wandb")
        known = place.directory / "wandb.id"
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:16] + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=place.project,
            name=place.name,
            id=known.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=place.config,
            dir=str(place.directory),
            mode="offline" if place.offline else "online",
            # neither the environment nor the source is anybody's business
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
                x_save_requirements=False,
            ),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        """A point of each curve, over `step`."""
        self._run.log({name if name == "step" else scalar_name(name): value for name, value in row.items()})

    def close(self) -> None:
        """Until everything is handed over."""
        self._run.finish()
