"""A run as frozen dataclasses, one for each section of its file.

Every field carries its help text: the documentation and `llmtune train --help` are generated from here. Unknown keys, wrong
types and impossible combinations are refused with the key's path, before anything is read or written.

    Run
     |- data                 config/data.py
     |- adapt                config/adapt.py, config/added.py
     |- quantize             config/quantize.py
     |- optimizer            config/optimizers.py
     |- train                config/optimization.py
     |- checkpoint           config/checkpoint.py
     |- safeguards           config/safeguards.py
     |- tracking, export     config/tracking.py, config/export.py
     |- divergence           config/divergence.py
     |- regularize, average, early_stopping       config/regularize.py
     `- sharding, evaluate
"""

from dataclasses import dataclass
from typing import Literal

from llmtune.config.adapt import METHODS, Adapt, LowRankSection, check_adapt, places, sections
from llmtune.config.added import VirtualTokens
from llmtune.config.checkpoint import Checkpoint, check_checkpoint
from llmtune.config.continuing import Continuing, check_continuing
from llmtune.config.data import Data, added_tokens, check_data, require_room
from llmtune.config.divergence import Divergence, check_divergence
from llmtune.config.export import Export, check_export
from llmtune.config.key import key
from llmtune.config.optimization import Train, check_train
from llmtune.config.optimizers import OPTIMIZERS, AdamW, Optimizer
from llmtune.config.quantize import Quantize, check_loftq, check_quantize
from llmtune.config.regularize import Average, EarlyStopping, Regularize, check_regularize
from llmtune.config.safeguards import Safeguards, check_safeguards
from llmtune.config.tracking import Tracking, check_tracking
from llmtune.errors import LlmtuneConfigError


@dataclass(frozen=True)
class Sharding:
    """How weights and rows are spread over devices."""

    strategy: str = key("a table of configs/strategies (docs/sharding.md lists them), or the path of one", "fsdp")
    mesh: dict[str, int] = key("size of each mesh axis; -1: what the others leave over; empty: chosen to fit", {})


@dataclass(frozen=True)
class Evaluate:
    """Held-out loss during training, and samples before and after."""

    every: int | None = key("steps between evaluations; null: only before and after", 50)
    max_batches: int | None = key("batches of validation data per evaluation; null: all", None)
    prompts: list[str] = key("continued greedily before and after training", [])
    samples_every: int | None = key("steps between samples of the same prompts; null: only before and after", None)
    max_new_tokens: int = key("length of those samples", 64)


@dataclass(frozen=True)
class Run:
    """A training run."""

    model: str = key("a Hugging Face directory, or a preset of configs/models (random weights)")
    output: str = key("the run's directory; the same configuration on it resumes")
    data: Data = key("data")
    continue_from: str | Continuing | None = key(
        "an earlier run whose weights this one begins with, its data and schedule being others on purpose", None
    )
    objective: Literal["pretrain", "sft"] = key("pretrain: every token is a target; sft: completions are", "sft")
    adapt: Adapt | None = key(
        "a parameter transform, or a list of them; absent: full fine-tuning", None, methods=METHODS
    )
    quantize: Quantize | list[Quantize] | None = key(
        "the base in few bits, or a list of such sections; absent: as stored", None
    )
    optimizer: Optimizer = key("optimizer", AdamW(), methods=OPTIMIZERS)
    train: Train = key("training", Train())
    sharding: Sharding | None = key("sharding; absent: fsdp over all devices", None)
    checkpoint: Checkpoint = key("checkpoints", Checkpoint())
    safeguards: Safeguards = key("against hangs and lost processes", Safeguards())
    divergence: Divergence = key("bad steps", Divergence())
    regularize: Regularize = key("against overfitting and forgetting", Regularize())
    average: Average | None = key("a moving average of the weights; absent: none", None)
    early_stopping: EarlyStopping | None = key("the end of a run that no longer gets better; absent: none", None)
    evaluate: Evaluate = key("evaluation", Evaluate())
    tracking: Tracking = key("tracking", Tracking())
    export: Export = key("export", Export())


def check(run: Run) -> None:
    """What no single field can say. Raises LlmtuneConfigError naming the key."""

    def require(condition: bool, path: str, said: str) -> None:
        if not condition:
            raise LlmtuneConfigError(f"{path}: {said}")

    check_data(run.data, require)
    check_tracking(run.tracking, require)
    if run.data.streaming:
        require(
            run.objective == "pretrain",
            "data.streaming",
            f"objective {run.objective} needs its rows whole; take pretrain",
        )
        require(run.data.packing, "data.streaming", "a stream is packed as it comes; leave data.packing true")
        require(run.train.epochs is None, "train.epochs", "a stream has no known length; give train.steps")
    check_export(run.export, require)
    check_continuing(run.continue_from, run.output, require)
    run.optimizer.check(require)
    check_train(run.train, require)
    tokens = run.train.batch_size * run.data.sequence_length
    require(
        tokens < 2**31,
        "train.batch_size",
        f"{run.train.batch_size} rows of data.sequence_length {run.data.sequence_length} are {tokens:,} tokens in a step, "
        "which counts up to 2147483647",
    )
    check_divergence(run.divergence, require)
    check_regularize(run.regularize, run.average, run.early_stopping, require)
    if run.early_stopping is not None and run.early_stopping.metric.startswith("eval_"):
        measured = run.data.validation is not None and run.evaluate.every is not None
        require(measured, "early_stopping.metric", "held-out figures need data.validation and evaluate.every")
    require(
        run.train.dtype != "float16" or run.divergence.non_finite == "skip",
        "divergence.non_finite",
        "float16 finds its loss scale by skipping steps that overflow; set it to skip",
    )
    if run.quantize is not None:
        require(
            run.adapt is not None,
            "quantize",
            "a quantised base does not train; give an adapter (adapt), or leave it out",
        )
    check_quantize(run.quantize, require)
    check_adapt(run.adapt, require)
    added = added_tokens(run.data)
    require(
        not added or all(section.from_ is None for section in sections(run.adapt)),
        added[0][0] if added else "data",
        "an adapter that is continued keeps its vocabulary; leave the tokens out, or begin from a merged model",
    )
    for at, section in places(run.adapt):
        if isinstance(section, LowRankSection) and section.initial == "loftq":
            check_loftq(run.quantize, f"{at}.initial", require)
        if isinstance(section, VirtualTokens):
            require_room(section.virtual_tokens, run.data, f"{at}.virtual_tokens")
    check_safeguards(run.safeguards, require)
    check_checkpoint(run.checkpoint, run.evaluate.every, bool(run.data.validation), require)
    evaluate = run.evaluate
    for name in ("every", "max_batches", "samples_every", "max_new_tokens"):
        path, value = f"evaluate.{name}", getattr(evaluate, name)
        require(value is None or value > 0, path, f"{value} must be positive")
