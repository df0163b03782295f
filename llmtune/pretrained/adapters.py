"""Adapters: PEFT directories in and out. A row of FAMILIES for each `peft_type`, beside the table of `checkpoints_convert.peft`.

fit_to_adapter(source, path)           the base with the vocabulary that a PEFT adapter was trained with
load_adapter(path, config)             a transform that adds it, and what it brings in whole
save_adapter(path, params, source)     a PEFT directory
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert import hf_weights, peft
from checkpoints_convert.peft.lora import Factors as PeftFactors
from checkpoints_convert.peft.lora import LoraValues
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import ModelConfig
from llmtune.pretrained.source import Source, fetch_from, on_host, open_source
from llmtune.transforms import Factors, Transform, chain, given_whole, lora_from, weights_by_path
from llmtune.weights import LoRA, is_adapter

Weights = Mapping[str, Any]  # arrays and operators, by path


class Family(NamedTuple):
    """`given`: values as read -> the transform that puts them in; `collect`: weights -> values to write, None where none."""

    given: Callable[[Any], Transform]
    collect: Callable[[Weights], Any]


def _lora_given(values: LoraValues) -> Transform:
    factors = {name: Factors(own.a, own.b, own.scale, own.ranks) for name, own in values.factors.items()}
    return lora_from(factors, rslora=values.rslora)


def _lora_collect(weights: Weights) -> LoraValues | None:
    adapters = {name: weight for name, weight in weights.items() if isinstance(weight, LoRA)}
    factors = {name: PeftFactors(on_host(w.a), on_host(w.b), on_host(w.scale), w.ranks) for name, w in adapters.items()}
    return LoraValues(factors, any(weight.rslora for weight in adapters.values())) if adapters else None


FAMILIES: dict[str, Family] = {"LORA": Family(_lora_given, _lora_collect)}


@dataclass(frozen=True)
class LoadedAdapter:
    """What a PEFT directory does to a model; `whole`: the paths of the weights that it brings in whole."""

    transform: Transform
    whole: tuple[str, ...]
    method: str


def fit_to_adapter(source: Source, path: str | Path) -> Source:
    """The base as the adapter found it: with the vocabulary that it was resized to, and the tokenizer that came with that."""
    path = Path(path)
    size = peft.read_vocabulary_size(path, source.config)
    if size is None:
        return source
    if size != source.config.vocab_size:
        source = source.resized(size, tokens=size)
    return replace(source, companions=(*source.companions, path)) if hf_weights.has_tokenizer(path) else source


def as_exported(source: Source, path: Path) -> Source:
    """The base with the tokenizer, and the ends of a text, that the merged export of its adapter has."""
    config = replace(source.config, eos_token_ids=open_source(str(path)).config.eos_token_ids)
    return replace(source, config=config, companions=(*source.companions, path))


def load_adapter(path: str | Path, config: ModelConfig) -> LoadedAdapter:
    """A PEFT directory's adapter, with its values, for a base whose vocabulary fits it (`fit_to_adapter`)."""
    adapter = peft.read_adapter(Path(path), config)
    transform = given_whole(adapter.whole)
    if adapter.values is not None:
        transform = chain(transform, FAMILIES[adapter.method].given(adapter.values))
    return LoadedAdapter(transform, tuple(adapter.whole), adapter.method)


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
    nested = [name for name, weight in weights.items() if is_adapter(weight) and is_adapter(weight.base)]
    if nested:
        raise LlmtuneConfigError(f"save_adapter: {nested[0]} carries several adapters; save() writes the merged model")
    method, values = _collect(weights)
    own = source.resize is not None or source.tokenizer_directory != source.directory
    home = tokenizer or (source.tokenizer_directory if own else None)

    def finish(directory: Path) -> None:
        if home is not None:
            hf_weights.copy_companions(home, directory, hf_weights.TOKENIZER)
        complete(directory)

    adapted = peft.METHODS[method].adapted(values)
    peft.write_adapter(
        path,
        method,
        values,
        source.config,
        base=source.name if source.directory is None else str(source.directory.absolute()),
        whole_paths=whole,
        fetch=fetch_from({name: weight.base if name in adapted else weight for name, weight in weights.items()}),
        complete=finish,
    )


def _collect(weights: Weights) -> tuple[str, Any]:
    """The one method that the weights carry, and its values on the host."""
    found = {method: family.collect(weights) for method, family in FAMILIES.items()}
    methods = [method for method, values in found.items() if values is not None]
    if not methods:
        raise LlmtuneConfigError("save_adapter: this model has no adapter; save() writes the whole model")
    if len(methods) > 1:
        raise LlmtuneConfigError(
            f"save_adapter: this model has adapters of several methods ({', '.join(methods)}), which no PEFT directory holds; "
            "save() writes the merged model"
        )
    return methods[0], found[methods[0]]
