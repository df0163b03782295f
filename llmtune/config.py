"""A run as frozen dataclasses, and the strict way from YAML to them.

Every field carries its help text: the documentation and `llmtune train --help` are generated from here. Unknown keys, wrong
types and impossible combinations are refused with the key's path, before anything is read or written.
"""

import math
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from llmtune.adapt_config import METHODS, Adapt, check_adapt, places, sections
from llmtune.added_config import VirtualTokens
from llmtune.config_key import key
from llmtune.errors import LlmtuneConfigError

Format = Literal["auto", "messages", "sharegpt", "alpaca", "dolly", "prompt_completion", "text", "tokens"]
COLUMNS = (
    "messages", "conversations", "instruction", "input", "output", "context", "response", "system", "history", "tools",
    "prompt", "completion", "text",
)  # fmt: skip


@dataclass(frozen=True)
class DataSource:
    """One item of a mixture, where a path alone does not say enough."""

    path: str = key("a file, a directory (all data files below it), or a pattern such as chats/*.jsonl.gz")
    weight: float = key("passes through it per epoch: 0.5 is half of its rows, the other half in the next epoch", 1.0)
    format: Format | None = key("of its rows; null: data.format", None)
    columns: dict[str, str] | None = key("its column names; null: data.columns", None)


@dataclass(frozen=True)
class Data:
    """What is read, and how it becomes rows of tokens."""

    train: str | list[str | DataSource] = key(
        "a file (jsonl, json, csv, txt, parquet; also .gz, .bz2, .xz, .zst), a directory, a pattern, or a list of them"
    )
    validation: str | list[str | DataSource] | None = key(
        "held-out rows, evaluated before, during and after; written like data.train, without weights", None
    )
    format: Format = key("of the rows; auto goes by the columns of the first one, and says what it found", "auto")
    chat_template: str | None = key(
        "null: the model's own; or the name of a built-in one (llama3.1, ...), or the path of a .jinja file", None
    )
    sequence_length: int = key("tokens per row of the batch", 1024)
    packing: bool = key("several documents per row, by a plan; each sees only itself", True)
    shuffle: bool = key("a new order every epoch, from train.seed; false: file order", True)
    too_long: Literal["truncate", "drop", "error"] = key(
        "rows beyond sequence_length (text is split instead)", "truncate"
    )
    invalid: Literal["error", "skip"] = key(
        "rows that cannot be used: the first one is an error, or they are counted", "error"
    )
    max_skipped: float = key("largest share of rows that invalid: skip may leave out", 0.01)
    columns: dict[str, str] = key(
        "other column names, e.g. {prompt: question, completion: answer}, or paths: {output: instances.0.output}", {}
    )
    tokenizer: str | None = key("a directory with a tokenizer other than the model's", None)
    add_tokens: list[str] = key("new words of the vocabulary: their spelling in any text is one token", [])
    add_special_tokens: list[str] = key("new control tokens: only a chat template's own text makes them", [])
    pad_vocabulary_to: int = key("a vocabulary that added tokens outgrow is rounded up to a multiple of this", 64)


@dataclass(frozen=True)
class Quantize:
    """The frozen base kept in few bits; absent: as it is stored. Takes an adapter, which is what trains."""

    base: Literal["nf4", "int4", "int8", "fp8"] = key("how each number is kept; see docs/quantization.md", "nf4")
    double: bool = key("nf4: the blocks' magnitudes in 8 bits too (4.13 bits per number instead of 4.5)", True)
    targets: str | list[str] = key(
        "layers (all matrices of the layers, experts too), or as adapt.targets; the embedding is never quantised",
        "layers",
    )
    merge_into: Literal["dequantized", "original"] = key(
        "what the exported model's adapter is merged into: the numbers it trained on, or those of the base as stored",
        "dequantized",
    )


@dataclass(frozen=True)
class Optimizer:
    """How gradients become updates."""

    name: Literal["adamw"] = key("AdamW as in torch: decoupled decay, eps outside the root", "adamw")
    learning_rate: float = key("peak", 2e-4)
    schedule: Literal["constant", "linear", "cosine"] = key("after warmup, down to final_fraction", "cosine")
    warmup_steps: int = key("linear from 0 to the peak", 10)
    final_fraction: float = key("of the peak, where linear and cosine end", 0.0)
    weight_decay: float = key("decoupled", 0.0)
    decay: Literal["all", "matrices"] = key("which trainable weights decay: all, or all but norms", "all")
    b1: float = key("decay of the first moment", 0.9)
    b2: float = key("decay of the second moment", 0.999)
    eps: float = key("added to the root of the second moment", 1e-8)
    clip_norm: float | None = key("largest global gradient norm; null: no clipping", 1.0)


@dataclass(frozen=True)
class Train:
    """How long, how much at a time, in which precision."""

    steps: int | None = key("optimizer updates; 200 where epochs is absent too", None)
    epochs: float | None = key("instead of steps: passes over the training rows", None)
    batch_size: int = key("rows per update, over all devices and hosts", 8)
    microbatches: int = key("pieces in which a batch is computed; divides batch_size", 1)
    dtype: Literal["bfloat16", "float32"] = key(
        "of matmuls and activations; weights that train stay float32", "bfloat16"
    )
    remat: Literal["none", "block", "dots"] = key("what is computed again in the backward pass to save memory", "block")
    seed: int = key("of data order and initial values", 0)


@dataclass(frozen=True)
class Sharding:
    """How weights and rows are spread over devices."""

    strategy: str = key("a table of configs/strategies (fsdp, tensor, expert), or the path of one", "fsdp")
    mesh: dict[str, int] = key("size of each mesh axis; -1: what the others leave over; empty: chosen to fit", {})


@dataclass(frozen=True)
class Checkpoint:
    """What a run can be resumed from."""

    every: int = key("steps between checkpoints (one is always written at the end)", 100)
    keep: int = key("newest checkpoints that stay", 3)


@dataclass(frozen=True)
class Evaluate:
    """Held-out loss during training, and samples before and after."""

    every: int | None = key("steps between evaluations; null: only before and after", 50)
    max_batches: int | None = key("batches of validation data per evaluation; null: all", None)
    prompts: list[str] = key("continued greedily before and after training", [])
    max_new_tokens: int = key("length of those samples", 64)


@dataclass(frozen=True)
class Run:
    """A training run."""

    model: str = key("a Hugging Face directory, or a preset of configs/models (random weights)")
    output: str = key("the run's directory; the same configuration on it resumes")
    data: Data = key("data")
    objective: Literal["pretrain", "sft"] = key("pretrain: every token is a target; sft: completions are", "sft")
    adapt: Adapt | None = key(
        "a parameter transform, or a list of them; absent: full fine-tuning", None, methods=METHODS
    )
    quantize: Quantize | None = key("the base in few bits; absent: as stored", None)
    optimizer: Optimizer = key("optimizer", Optimizer())
    train: Train = key("training", Train())
    sharding: Sharding | None = key("sharding; absent: fsdp over all devices", None)
    checkpoint: Checkpoint = key("checkpoints", Checkpoint())
    evaluate: Evaluate = key("evaluation", Evaluate())


def check(run: Run) -> None:
    """What no single field can say. Raises LlmtuneConfigError naming the key."""

    def require(condition: bool, path: str, said: str) -> None:
        if not condition:
            raise LlmtuneConfigError(f"{path}: {said}")

    data, optimizer, train = run.data, run.optimizer, run.train
    for path, given in (("data.train", data.train), ("data.validation", data.validation)):
        sources = sources_of(given)
        require((bool(sources) and all(own.path for own in sources)) or given is None, path, "no file is given")
        for source in sources:
            require(0 < source.weight < math.inf, f"{path}.weight", f"{source.weight} must be a positive number")
            require(source.weight == 1 or given is data.train, path, "weights belong to training data")
            _require_columns(f"{path}.columns", source.columns or {})
    _require_columns("data.columns", data.columns)
    require(0 <= data.max_skipped <= 1, "data.max_skipped", f"{data.max_skipped} must lie in 0..1")
    length = data.sequence_length
    require(
        2 <= length < 2**31, "data.sequence_length", f"{length} is too {'short; 2 or more' if length < 2 else 'long'}"
    )
    added = [("data.add_tokens", token) for token in data.add_tokens]
    added += [("data.add_special_tokens", token) for token in data.add_special_tokens]
    for place, (path, token) in enumerate(added):
        require(token.strip() != "", path, f"{token!r} is empty; give the spelling of a token")
        require(_is_text(token), path, f"{token!r} holds a lone surrogate, which is no character")
        require(token not in [other for _, other in added[:place]], path, f"{token!r} is given twice")
    require(data.pad_vocabulary_to > 0, "data.pad_vocabulary_to", f"{data.pad_vocabulary_to} must be positive")
    require(train.steps is None or train.epochs is None, "train", "steps and epochs are both given; give one of them")
    require(train.steps is None or 0 < train.steps < 2**31, "train.steps", f"{train.steps} must lie in 1..2147483647")
    require(train.epochs is None or 0 < train.epochs < math.inf, "train.epochs", f"{train.epochs} must be positive")
    require(train.batch_size > 0, "train.batch_size", f"{train.batch_size} must be positive")
    require(
        train.microbatches > 0 and train.batch_size % train.microbatches == 0,
        "train.microbatches",
        f"{train.microbatches} does not divide train.batch_size {train.batch_size}",
    )
    require(0 <= train.seed < 2**31, "train.seed", f"{train.seed} must lie in 0..2147483647")
    for name in ("learning_rate", "eps"):
        value = getattr(optimizer, name)
        require(0 < value < math.inf, f"optimizer.{name}", f"{value} must be a positive number")
    for name in ("weight_decay", "final_fraction"):
        value = getattr(optimizer, name)
        require(0 <= value < math.inf, f"optimizer.{name}", f"{value} must be 0 or more")
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        require(0 <= value < 1, f"optimizer.{name}", f"{value} must lie in [0, 1)")
    require(optimizer.warmup_steps >= 0, "optimizer.warmup_steps", f"{optimizer.warmup_steps} must be 0 or more")
    require(
        optimizer.clip_norm is None or optimizer.clip_norm > 0,
        "optimizer.clip_norm",
        "must be positive, or null for none",
    )
    if run.quantize is not None:
        require(
            run.adapt is not None,
            "quantize",
            "a quantised base does not train; give an adapter (adapt), or leave it out",
        )
        require(bool(run.quantize.targets), "quantize.targets", "no target is given")
    check_adapt(run.adapt, require)
    require(
        not added or all(section.from_ is None for section in sections(run.adapt)),
        added[0][0] if added else "data",
        "an adapter that is continued keeps its vocabulary; leave the tokens out, or begin from a merged model",
    )
    for at, section in places(run.adapt):
        if isinstance(section, VirtualTokens):
            require_room(section.virtual_tokens, data, f"{at}.virtual_tokens")
    for path, value in (("checkpoint.every", run.checkpoint.every), ("checkpoint.keep", run.checkpoint.keep),
                        ("evaluate.every", run.evaluate.every), ("evaluate.max_batches", run.evaluate.max_batches),
                        ("evaluate.max_new_tokens", run.evaluate.max_new_tokens)):  # fmt: skip
        require(value is None or value > 0, path, f"{value} must be positive")


def require_room(virtual_tokens: int, data: Data, path: str) -> None:
    """Whether rows can begin with so many virtual tokens; `path`: the key that asks for them."""
    if data.packing:
        raise LlmtuneConfigError(
            f"data.packing: virtual tokens ({path}) stand before a row, which therefore holds one document; "
            "set data.packing: false"
        )
    if virtual_tokens >= data.sequence_length:
        raise LlmtuneConfigError(
            f"{path}: {virtual_tokens} virtual tokens are longer than the rows of data.sequence_length "
            f"{data.sequence_length}; take fewer, or longer rows"
        )


def _is_text(token: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in token)


def sources_of(given: str | list[str | DataSource] | None) -> list[DataSource]:
    """data.train or data.validation as a list of sources."""
    items = [] if given is None else [given] if isinstance(given, str) else given
    return [DataSource(item) if isinstance(item, str) else item for item in items]


def _require_columns(path: str, columns: dict[str, str]) -> None:
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise LlmtuneConfigError(f"{path}: {unknown[:1]} is no column here; there are {', '.join(COLUMNS)}")


def key_reference(kind: type = Run, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key path, type, default, help) of every key, sections followed by their keys.

    Of a section that is one of several methods, the keys of the default one; those of the others under `adapt[dora].`.
    """
    hints, rows = get_type_hints(kind), []
    for entry in fields(kind):
        path = f"{prefix}{entry.metadata.get('alias', entry.name)}"
        section = next((part for part in _parts(hints[entry.name]) if is_dataclass(part)), None)
        methods = entry.metadata.get("methods")
        if methods is not None:
            for number, (method, own) in enumerate(methods.items()):
                rows += key_reference(own, f"{path}[{method}]." if number else f"{path}.")
        elif section is not None:
            rows += key_reference(section, f"{path}.")  # type: ignore[arg-type]
        else:
            rows.append((path, _type_text(hints[entry.name]), _default_text(entry), entry.metadata["help"]))
            for item in _items(hints[entry.name]):
                rows += key_reference(item, f"{path}.[].")
    return rows


def _parts(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", None) or (hint,)


def _items(hint: Any) -> list[type]:
    """The sections that a list may hold."""
    lists = [part for part in _parts(hint) if getattr(part, "__origin__", None) is list]
    return [kind for part in lists for inner in _parts(part) for kind in _parts(inner) if is_dataclass(kind)]  # type: ignore[misc]


def _type_text(hint: Any) -> str:
    if type(None) in _parts(hint) and any(getattr(part, "__origin__", None) is Literal for part in _parts(hint)):
        return " or ".join(map(_type_text, _parts(hint)))
    if getattr(hint, "__origin__", None) is Literal:
        return " or ".join(map(str, hint.__args__))
    if hint is type(None):
        return "null"
    text = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", None) else str(hint)
    return text.replace("typing.", "").replace(f"{__name__}.", "").replace("None", "null")


def _default_text(entry: Field) -> str:
    value = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    if value is MISSING:
        return "required"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
