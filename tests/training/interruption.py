"""Stopping a run at a step, as Ctrl-C does, and hearing what it says."""

import contextlib
import io

import jax
from rich.console import Console

import llmtune
from llmtune.training.display import Display


class StoppingDisplay(Display):
    """Raises KeyboardInterrupt once `step` steps of training are done; keeps what was printed."""

    def __init__(self, step=None):
        self.written = io.StringIO()
        super().__init__(Console(file=self.written, soft_wrap=True, highlight=False))
        self.step, self.training = step, False

    @property
    def text(self):
        return self.written.getvalue()

    def phase(self, name, total, done=0):
        self.training = name == "training"
        super().phase(name, total, done)

    def advance(self, by=1, status=""):
        super().advance(by, status)
        if self.training and self._done == self.step:
            raise KeyboardInterrupt


def train_until(run, step, devices=1):
    """Train, and be interrupted after `step`."""
    with contextlib.suppress(KeyboardInterrupt):
        llmtune.train(run, StoppingDisplay(step), devices=jax.devices()[:devices])
        raise AssertionError("the run ended before it could be interrupted")
