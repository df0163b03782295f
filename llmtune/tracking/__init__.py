"""Trackers: where the rows of a run go.

tracker       the protocol, and several as one
tensorboard   event files, always
wandb, mlflow, trackio   services, where `tracking.to` asks for them
services      those by name
"""

from llmtune.tracking.services import open_services, require_installed
from llmtune.tracking.tensorboard import TensorBoard
from llmtune.tracking.tracker import All, Place, Row, Tracker

__all__ = ["All", "Place", "Row", "TensorBoard", "Tracker", "open_services", "require_installed"]
