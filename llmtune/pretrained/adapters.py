"""Adapters: PEFT directories in and out. A row of FAMILIES for each `peft_type`, beside the table of `checkpoints_convert.peft`.

fit_to_adapter(source, path)           the base with the vocabulary that a PEFT adapter was trained with
load_adapter(path, config)             a transform that adds it, and what it brings in whole
save_adapter(path, params, source)     a PEFT directory
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_convert import companions, peft
from checkpoints_convert.peft import forms
from checkpoints_convert.peft.directory import CONFIG
from checkpoints_convert.peft.factors import Factors as PeftFactors
from checkpoints_convert.peft.lora import LoraValues
from checkpoints_convert.peft.vectors import Gains as PeftGains
from checkpoints_convert.peft.vectors import VeraValues
from checkpoints_convert.safetensors_reader import read_json
from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.pretrained.added import ADDED, Family, Weights, added_name
from llmtune.pretrained.saving import fetch_from, on_host
from llmtune.pretrained.source import Source, open_source
from llmtune.transforms import (
    Factors,
    Gains,
    Projections,
    Transform,
    Vectors,
    chain,
    given_whole,
    ia3_from,
    lora_from,
    vera_from,
    weights_by_path,
)
from llmtune.weights import IA3, VeRA, beneath, is_adapter, low_rank_values


def _lora_given(values: LoraValues, dropout: float) -> Transform:
    factors = {name: Factors(own.a, own.b, own.scale, own.ranks, own.magnitude) for name, own in values.factors.items()}
    return lora_from(factors, rslora=values.rslora, dropout=dropout)


def _lora_collect(weights: Weights) -> LoraValues | None:
    found = {name: low_rank_values(weight) for name, weight in weights.items()}
    own = {name: values for name, values in found.items() if values is not None}
    factors = {
        name: PeftFactors(
            on_host(v.a), on_host(v.b), on_host(v.scale), v.ranks, None if v.magnitude is None else on_host(v.magnitude)
        )
        for name, v in own.items()
    }
    settings = {(values.rslora, values.dropout) for values in own.values()}
    if len({rslora for rslora, _ in settings}) > 1:
        raise LlmtuneConfigError(
            "save_adapter: some adapters are rank-stabilised and some are not, which no PEFT directory says; "
            "save() writes the merged model"
        )
    return LoraValues(factors, any(r for r, _ in settings), max(rate for _, rate in settings)) if factors else None


def _ia3_given(values: Mapping[str, PeftGains], dropout: float) -> Transform:
    del dropout
    return ia3_from({name: Gains(own.gain, own.on, own.side) for name, own in values.items()})


def _ia3_collect(weights: Weights) -> dict[str, PeftGains] | None:
    own = {name: weight for name, weight in weights.items() if isinstance(weight, IA3)}
    return {name: PeftGains(on_host(w.gain), on_host(w.on), w.side) for name, w in own.items()} or None


def _vera_given(values: VeraValues, dropout: float) -> Transform:
    vectors = {name: Vectors(inner, values.outer[name]) for name, inner in values.inner.items()}
    return vera_from(Projections(values.a, values.b), vectors, dropout=dropout)


def _vera_collect(weights: Weights) -> VeraValues | None:
    own = {name: weight for name, weight in weights.items() if isinstance(weight, VeRA)}
    if not own:
        return None
    one = next(iter(own.values()))
    inner, outer = ({name: on_host(getattr(w, part)) for name, w in own.items()} for part in ("inner", "outer"))
    return VeraValues(on_host(one.a), on_host(one.b), inner, outer)


FAMILIES: dict[str, Family] = {
    "LORA": Family(_lora_given, _lora_collect),
    "IA3": Family(_ia3_given, _ia3_collect),
    "VERA": Family(_vera_given, _vera_collect),
    **ADDED,
}
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class LoadedAdapter:
    """What a PEFT directory does to a model; `whole`: the paths of the weights that it brings in whole.

    `method`: as `adapt.method` names it.
    """

    transform: Transform
    whole: tuple[str, ...]
    method: str


def fit_to_adapter(source: Source, path: str | Path) -> Source:
    """The base as the adapter found it: with the vocabulary that it was resized to, and the tokenizer that came with that.

    And with a head of its own, where the adapter is on one end of a tied model.
    """
    path = Path(path)
    if source.config.tie_word_embeddings and peft.adapts_an_end(path):
        source = source.apart()  # peft adapts one use of the table, not the other
    size = peft.read_vocabulary_size(path, source.config)
    if size is None:
        return source
    if size != source.config.vocab_size:
        source = source.resized(size, tokens=size)
    return replace(source, companions=(*source.companions, path)) if companions.has_tokenizer(path) else source


def as_exported(source: Source, adapter: Path) -> Source:
    """The base with the tokenizer, and the ends of a text, that the export of a run has.

    They lie in the merged model beside the adapter; where it could not be merged, with the adapter.
    """
    path = adapter.with_name("model")
    if not path.is_dir():
        ends = read_json(adapter / GENERATION)["eos_token_id"]
        return replace(source, config=replace(source.config, eos_token_ids=tuple(ends)))
    config = replace(source.config, eos_token_ids=open_source(str(path)).config.eos_token_ids)
    return replace(source, config=config, companions=(*source.companions, path))


def load_adapter(path: str | Path, config: ModelConfig, *, dropout: float = 0.0) -> LoadedAdapter:
    """A PEFT directory's adapter, with its values, for a base whose vocabulary fits it (`fit_to_adapter`).

    `dropout`: of its input while it trains on; what the directory says of that is of an earlier training.
    """
    adapter = peft.read_adapter(Path(path), config)
    transform = given_whole(adapter.whole)
    if adapter.values is not None:
        transform = chain(transform, FAMILIES[adapter.method].given(adapter.values, dropout))
    return LoadedAdapter(transform, tuple(adapter.whole), _method(adapter))


def _method(adapter: peft.Adapter) -> str:
    """The name that a configuration has for the adapter's method: DoRA is LORA to PEFT."""
    dora = isinstance(adapter.values, LoraValues) and any(
        own.magnitude is not None for own in adapter.values.factors.values()
    )
    return "dora" if dora else added_name(adapter) or adapter.method.lower()


def form_note(path: Path) -> str | None:
    """For a person: why peft will not read this directory of an adapter; None where it will."""
    return forms.said_of(read_json(path / CONFIG)["peft_type"])


def read_factors(path: str | Path, config: ModelConfig) -> Mapping[str, Factors]:
    """The values of a LoRA directory, by path. One of another method, or that brings weights in whole, is refused."""
    adapter = peft.read_adapter(Path(path), config)
    if adapter.whole or not isinstance(adapter.values, LoraValues) or _method(adapter) != "lora":
        more = "weights in whole" if adapter.whole else f"the method {_method(adapter)}"
        raise LlmtuneFormatError(f"{path}: it brings {more}; a bank is of LoRA adapters alone")
    return {n: Factors(own.a, own.b, own.scale, own.ranks) for n, own in adapter.values.factors.items()}


def save_adapter(
    path: Path,
    params: Any,
    source: Source,
    *,
    whole: Sequence[str] = (),
    tokenizer: Path | None = None,
    base: str | None = None,
    complete: Callable[[Path], None] = lambda directory: None,
) -> None:
    """A PEFT directory of the adapter in `params`, and of the weights that trained in whole beside it.

    What PEFT has no form for is written in one of our own (`form_note` says so).
    `base`: the name of the base that it is on, where that is not the source. Where the tokenizer is not the base's, it goes with
    the adapter (`tokenizer`: the directory of another than the source's).
    """
    weights = weights_by_path(params)
    nested = [name for name, weight in weights.items() if is_adapter(weight) and is_adapter(beneath(weight))]
    if nested:
        raise LlmtuneConfigError(f"save_adapter: {nested[0]} carries several adapters; save() writes the merged model")
    method, values = _collect(weights)
    own = source.resize is not None or source.tokenizer_directory != source.directory
    home = tokenizer or (source.tokenizer_directory if own else None)

    def finish(directory: Path) -> None:
        if home is not None:
            companions.copy_companions(home, directory, companions.TOKENIZER)
        complete(directory)

    adapted = peft.METHODS[method].adapted(values)
    peft.write_adapter(
        path,
        method,
        values,
        source.config,
        base=base or (source.name if source.directory is None else str(source.directory.absolute())),
        whole_paths=whole,
        fetch=fetch_from({name: beneath(weight) if name in adapted else weight for name, weight in weights.items()}),
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
