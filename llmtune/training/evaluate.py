"""What a run measures of itself: held-out loss, and samples before and after."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtune.config import Run
from llmtune.data import Dataset, HostBatch, evaluation_batches
from llmtune.evaluation.perplexity import HeldOut, held_out_loss
from llmtune.training.run_directory import RunDirectory
from llmtune.training.state import TrainState
from llmtune.transforms import combine


@dataclass(frozen=True)
class Evaluator:
    """`loss_step` and `place` are those of training; `sample` continues the run's prompts with a tree of weights."""

    run: Run
    validation: Dataset | None
    loss_step: Callable[..., Any]
    place: Callable[[HostBatch], Any]
    sample: Callable[[Any], list[str]]

    def held_out(self, state: TrainState, frozen: Any) -> HeldOut | None:
        """Loss over the validation data; None without any."""
        if self.validation is None:
            return None
        batches = evaluation_batches(
            self.validation, self.run.train.batch_size, self.run.data.sequence_length, self.run.evaluate.max_batches
        )
        return held_out_loss(self.loss_step, state.trainable, frozen, map(self.place, batches))

    def record(self, directory: RunDirectory, moment: str, state: TrainState, frozen: Any) -> HeldOut | None:
        """Measure and sample, and write both under `moment` ("before", "after") into evaluation.json."""
        held_out = self.held_out(state, frozen)
        completions = self.sample(combine(state.trainable, frozen))
        samples = [
            {"prompt": prompt, "completion": completion}
            for prompt, completion in zip(self.run.evaluate.prompts, completions, strict=False)
        ]
        figures = {} if held_out is None else {
            "loss": held_out.loss, "perplexity": held_out.perplexity, "tokens": held_out.tokens
        }  # fmt: skip
        directory.write_evaluation({**directory.read_evaluation(), moment: {**figures, "samples": samples}})
        return held_out


def recorded(directory: RunDirectory, moment: str) -> HeldOut | None:
    """What `record` measured earlier, when a run is taken up again."""
    figures = directory.read_evaluation().get(moment, {})
    return HeldOut(figures["loss"], figures["tokens"]) if "loss" in figures else None
