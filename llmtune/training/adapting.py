"""From the `adapt` sections of a run to one transform: a table of methods, chained in the order of the file.

    [Lora(rank=8), ...]  -->  Adaptation(chain(lora(rank=8, ...), ...), paths that train in whole beside them)

A new method is a dataclass in `llmtune/adapt_config.py`, a transform in `llmtune/transforms`, and a row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune import pretrained
from llmtune.adapt_config import (
    AdapterFusion,
    Houlsby,
    Lora,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
)
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import ModelConfig
from llmtune.transforms import (
    Params,
    Transform,
    chain,
    full,
    fusion_of,
    lora,
    not_mergeable,
    p_tuning,
    parallel_adapters,
    prefix_tuning,
    prompt_tuning,
    select_whole,
    sequential_adapters,
    train_whole,
)

# (section, declared weights that it is applied to, what the model is) -> transform
MakeTransform = Callable[[Any, Params, ModelConfig], Transform]


def _lora(section: Lora, declared: Params, config: ModelConfig) -> Transform:
    return lora(rank=section.rank, alpha=section.alpha, targets=section.targets, rslora=section.rslora)


def _prompt_tuning(section: PromptTuning, declared: Params, config: ModelConfig) -> Transform:
    return prompt_tuning(virtual_tokens=section.virtual_tokens)


def _p_tuning(section: PTuning, declared: Params, config: ModelConfig) -> Transform:
    return p_tuning(virtual_tokens=section.virtual_tokens, encoder_hidden=section.encoder_hidden)


def _prefix_tuning(section: PrefixTuning, declared: Params, config: ModelConfig) -> Transform:
    return prefix_tuning(virtual_tokens=section.virtual_tokens)


def _sequential(section: Houlsby | Pfeiffer, declared: Params, config: ModelConfig) -> Transform:
    return sequential_adapters(section.method, size=section.size)


def _parallel(section: ParallelAdapter, declared: Params, config: ModelConfig) -> Transform:
    return parallel_adapters(size=section.size, scale=section.scale)


def _fusion(section: AdapterFusion, declared: Params, config: ModelConfig) -> Transform:
    return fusion_of([pretrained.read_branches(path, config) for path in section.adapters])


METHODS: dict[type, MakeTransform] = {
    Lora: _lora,
    PromptTuning: _prompt_tuning,
    PTuning: _p_tuning,
    PrefixTuning: _prefix_tuning,
    Houlsby: _sequential,
    Pfeiffer: _sequential,
    ParallelAdapter: _parallel,
    AdapterFusion: _fusion,
}


@dataclass(frozen=True)
class Adaptation:
    """`whole`: the paths of weights that train in whole beside an adapter, and belong to it; `declared`: the weights adapted."""

    transform: Transform
    whole: tuple[str, ...]
    declared: Params


def choose_transform(
    sections: Sequence[Any], source: pretrained.Source, declared: Params, *, grown: bool
) -> Adaptation:
    """What the sections ask for; none is full fine-tuning.

    `grown`: tokens were added, so that their rows must train.
    """
    if not sections:
        return Adaptation(full, (), declared)
    transforms, whole, adapted = [], [], declared
    for section in sections:
        if section.from_ is not None:
            adapter = pretrained.load_adapter(section.from_, source.config)
            transforms.append(adapter.transform)
            whole += adapter.whole
        else:
            transforms.append(METHODS[type(section)](section, adapted, source.config))
        adapted = transforms[-1].apply(adapted, transforms[-1].init(adapted))
    alone = not_mergeable(adapted)
    if alone is not None and len(sections) > 1:
        raise LlmtuneConfigError(
            f"adapt: {alone[1]} in {alone[0]} cannot be merged, and no adapter directory holds two methods; train the other one "
            "first, and this one over its merged export"
        )
    rules = [rule for section in sections if section.from_ is None for rule in section.modules_to_save]
    own = select_whole(declared, [*rules, *(("embed_tokens", "lm_head") if grown else ())])
    return Adaptation(chain(*transforms, train_whole(own)), tuple(dict.fromkeys([*whole, *own])), adapted)
