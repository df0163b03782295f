"""Trackio: W&B's interface over a local database, which can be looked at with `trackio show`."""

import importlib
import os
from typing import final

from llmtune.tracking.tensorboard import scalar_name
from llmtune.tracking.tracker import Place, Row


@final
class Trackio:
    """A run of Trackio; offline its database lies in trackio/ of the run's directory, else where Trackio keeps its own."""

    def __init__(self, place: Place):
        if place.offline:
            os.environ["TRACKIO_DIR"] = str(place.directory / "trackio")  # read when it is imported
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(
            project=place.project, name=place.name, config=place.config, resume="allow", embed=False
        )

    def log(self, row: Row) -> None:
        """A point of each curve."""
        named = {scalar_name(name): value for name, value in row.items() if name != "step"}
        self._run.log(named, step=row["step"])

    def close(self) -> None:
        """Until everything is written."""
        self._run.finish()
