"""PEFT directories in and out: an adapter on disk is a transform with its values.

base: Source --fit_to_adapter--> Source with the adapter's vocabulary
PEFT directory --load_adapter--> transform: params -> params with LoRA(base, a, b, scale) where a matrix was
params with LoRA --save_adapter--> PEFT directory
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_convert import companions, peft
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import ModelConfig
from llmtune.pretrained.source import Source, fetch_from, on_host, open_source
from llmtune.transforms import Factors, Transform, chain, given_whole, lora_from, weights_by_path
from llmtune.weights import LoRA, is_operator


@dataclass(frozen=True)
class LoadedAdapter:
    """What a PEFT directory does to a model; `whole`: the paths of the weights that it brings in whole."""

    transform: Transform
    whole: tuple[str, ...]


def fit_to_adapter(source: Source, path: str | Path) -> Source:
    """The base as the adapter found it: with the vocabulary that it was resized to, and the tokenizer that came with that."""
    path = Path(path)
    size = peft.read_vocabulary_size(path, source.config)
    if size is None:
        return source
    if size != source.config.vocab_size:
        source = source.resized(size, tokens=size)
    return replace(source, companions=(*source.companions, path)) if companions.has_tokenizer(path) else source


def as_exported(source: Source, path: Path) -> Source:
    """The base with the tokenizer, and the ends of a text, that the merged export of its adapter has."""
    config = replace(source.config, eos_token_ids=open_source(str(path)).config.eos_token_ids)
    return replace(source, config=config, companions=(*source.companions, path))


def load_adapter(path: str | Path, config: ModelConfig) -> LoadedAdapter:
    """A PEFT directory's adapter, with its values, for a base whose vocabulary fits it (`fit_to_adapter`)."""
    adapter = peft.read_adapter(Path(path), config)
    given = {name: Factors(own.a, own.b, own.scale, own.ranks) for name, own in adapter.factors.items()}
    transform = chain(given_whole(adapter.whole), lora_from(given, rslora=adapter.rslora))
    return LoadedAdapter(transform, tuple(adapter.whole))


def save_adapter(
    path: Path,
    params: Any,
    source: Source,
    *,
    whole: Sequence[str] = (),
    tokenizer: Path | None = None,
    complete: Callable[[Path], None] = lambda directory: None,
) -> None:
    """A PEFT directory of the adapter in `params`, and of the weights that trained in whole beside it.

    Where the tokenizer is not the base's, it goes with the adapter (`tokenizer`: the directory of another than the source's).
    """
    weights = weights_by_path(params)
    adapters = {name: weight for name, weight in weights.items() if isinstance(weight, LoRA)}
    if not adapters:
        raise LlmtuneConfigError("save_adapter: this model has no adapter; save() writes the whole model")
    nested = [name for name, weight in adapters.items() if is_operator(weight.base)]
    if nested:
        raise LlmtuneConfigError(f"save_adapter: {nested[0]} carries several adapters; save() writes the merged model")
    factors = {
        name: peft.Factors(on_host(w.a), on_host(w.b), on_host(w.scale), w.ranks) for name, w in adapters.items()
    }
    own = source.resize is not None or source.tokenizer_directory != source.directory
    home = tokenizer or (source.tokenizer_directory if own else None)

    def finish(directory: Path) -> None:
        if home is not None:
            companions.copy_companions(home, directory, companions.TOKENIZER)
        complete(directory)

    peft.write_adapter(
        path,
        factors,
        source.config,
        base=source.name if source.directory is None else str(source.directory.absolute()),
        rslora=any(weight.rslora for weight in adapters.values()),
        whole=whole,
        fetch=fetch_from({name: weight.base if name in adapters else weight for name, weight in weights.items()}),
        complete=finish,
    )
