"""MLflow. Its run's id lies in the run's directory, so that a run taken up again goes on in the same place."""

import importlib
import os
import time
from typing import final

from llmtune.tracking.tensorboard import scalar_name
from llmtune.tracking.tracker import Place, Row

LONGEST = 6000  # characters of a parameter's value there


@final
class Mlflow:
    """A run of MLflow; offline it lies in mlruns/ of the run's directory, else at MLFLOW_TRACKING_URI."""

    def __init__(self, place: Place):
        if place.offline:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it would rather have a database
        tracking = importlib.import_module("mlflow.tracking")
        entities = importlib.import_module("mlflow.entities")
        self._metric = entities.Metric
        address = (place.directory / "mlruns").as_uri() if place.offline else None
        self._client = tracking.MlflowClient(tracking_uri=address)
        known = place.directory / "mlflow.id"
        if not known.exists():
            found = self._client.get_experiment_by_name(place.project)
            experiment = self._client.create_experiment(place.project) if found is None else found.experiment_id
            run = self._client.create_run(experiment, run_name=place.name)
            known.write_text(run.info.run_id + "\n", encoding="utf-8")
            parameters = [entities.Param(key, str(value)[:LONGEST]) for key, value in place.config.items()]
            self._client.log_batch(run.info.run_id, params=parameters)
        self._id = known.read_text(encoding="utf-8").strip()
        self._client.update_run(self._id, status="RUNNING")

    def log(self, row: Row) -> None:
        """A point of each curve."""
        now, step = int(time.time() * 1000), row["step"]
        # names are files there: loss/NAME would have to lie in the file of loss
        named = [(scalar_name(name.replace("/", ".")), value) for name, value in row.items() if name != "step"]
        metrics = [self._metric(name, float(value), now, step) for name, value in named]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """The run has ended there too."""
        self._client.set_terminated(self._id)
