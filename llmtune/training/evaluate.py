"""What a run measures of itself: held-out loss, and samples before and after."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.config import Run
from llmtune.data import RunData, evaluation_batches
from llmtune.evaluation.perplexity import HeldOut, held_out_loss
from llmtune.models.config import ModelConfig
from llmtune.training.processes import is_first
from llmtune.training.program import Program
from llmtune.training.run_directory import RunDirectory
from llmtune.training.samples import sample
from llmtune.training.state import TrainState
from llmtune.transforms import combine


@dataclass(frozen=True)
class Evaluator:
    """Measures states of one run, with the very functions and layouts of training."""

    run: Run
    config: ModelConfig
    data: RunData
    program: Program
    directory: RunDirectory

    def held_out(self, state: TrainState) -> HeldOut | None:
        """Loss over the validation data; None without any."""
        if self.data.validation is None:
            return None
        batches = evaluation_batches(
            self.data.validation,
            self.run.train.batch_size,
            self.run.data.sequence_length,
            self.run.evaluate.max_batches,
            packing=not self.program.virtual_tokens,
        )
        documents = max(int(batch["segment_ids"].max()) for batch in batches)
        share = self.program.own_rows
        placed = (self.program.place({name: rows[share] for name, rows in batch.items()}) for batch in batches)
        return held_out_loss(
            self.program.held_out_step, self.program.evaluated(state), self.program.frozen, placed, documents
        )

    def samples(self, state: TrainState) -> list[dict[str, str]]:
        """`[{"prompt", "completion"}]` of the run's prompts; [] without any, or without a tokenizer."""
        prompts, program = self.run.evaluate.prompts, self.program
        completions = sample(
            program.bind,
            combine(program.evaluated(state), program.frozen),
            [self.data.prompt_ids(prompt) for prompt in prompts],
            self.data.tokenizer,
            self.data.end_ids,
            self.config,
            program.mesh,
            program.strategy,
            self.run.evaluate.max_new_tokens,
        )
        pairs = zip(prompts, completions, strict=False)  # without a tokenizer there are no completions
        return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]

    def sample_at(self, step: int, state: TrainState) -> None:
        """Samples into samples.jsonl, with their step."""
        for own in self.samples(state):
            if is_first():
                self.directory.samples.log({"step": step, **own})

    def record(self, moment: str, state: TrainState) -> HeldOut | None:
        """Measure and sample, and write both under `moment` ("before", "after") into evaluation.json."""
        held_out, samples = self.held_out(state), self.samples(state)
        figures: dict[str, Any] = {}
        if held_out is not None:
            figures = {"loss": held_out.loss, "perplexity": held_out.perplexity, "tokens": held_out.tokens}
        figures["samples"] = samples
        if is_first():
            self._write(moment, figures, held_out)
        return held_out

    def _write(self, moment: str, figures: dict[str, Any], held_out: HeldOut | None) -> None:
        if held_out is not None:
            self.directory.write_held_out(moment, np.stack([held_out.losses, held_out.targets]))
        self.directory.write_evaluation({**self.directory.read_evaluation(), moment: figures})

    def recorded(self, moment: str) -> HeldOut | None:
        """What `record` measured earlier, when a run is taken up again."""
        sums = self.directory.read_held_out(moment)
        return None if sums is None else HeldOut(*sums)
