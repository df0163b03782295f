"""From the `adapt` sections of a run to one transform: a table of methods, chained in the order of the file.

    [Lora(rank=8), ...]  -->  Adaptation(chain(lora(rank=8, ...), ...), paths that train in whole beside them)

A new method is a dataclass in `llmtune/adapt_config.py`, a transform in `llmtune/transforms`, and a row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune import pretrained
from llmtune.adapt_config import Dora, Full, Ia3, Lora, LowRankSection, Vera
from llmtune.errors import LlmtuneConfigError
from llmtune.transforms import (
    INITIAL,
    Params,
    Transform,
    chain,
    dora,
    full,
    ia3,
    lora,
    select_whole,
    train_whole,
    vera,
    weights_by_path,
)

MakeTransform = Callable[[Any, Params], Transform]  # (section, declared weights that it is applied to) -> transform


def _low_rank(make: Callable[..., Transform]) -> MakeTransform:
    fields = ("rank", "alpha", "targets", "rslora", "dropout", "rank_pattern", "alpha_pattern", "layers")

    def of_section(section: LowRankSection, declared: Params) -> Transform:
        del declared
        return make(**{name: getattr(section, name) for name in fields}, initial=INITIAL.get(section.initial))

    return of_section


def _ia3(section: Ia3, declared: Params) -> Transform:
    del declared
    return ia3(targets=section.targets, feedforward=section.feedforward)


def _vera(section: Vera, declared: Params) -> Transform:
    del declared
    return vera(rank=section.rank, targets=section.targets, d_initial=section.d_initial, dropout=section.dropout)


def _full(section: Full, declared: Params) -> Transform:
    rules = [section.train] if isinstance(section.train, str) else section.train
    chosen = weights_by_path(declared) if rules == ["all"] else select_whole(declared, rules, key="adapt.train")
    stays = select_whole(declared, section.freeze, key="adapt.freeze")
    left = [path for path in chosen if path not in stays]
    if not left:
        raise LlmtuneConfigError("adapt.freeze: nothing is left to train; leave out a rule")
    return train_whole(left)


METHODS: dict[type, MakeTransform] = {
    Lora: _low_rank(lora),
    Dora: _low_rank(dora),
    Ia3: _ia3,
    Vera: _vera,
    Full: _full,
}


@dataclass(frozen=True)
class Adaptation:
    """`whole`: the paths of weights that train in whole beside an adapter, and belong to it."""

    transform: Transform
    whole: tuple[str, ...]


def choose_transform(
    sections: Sequence[Any], source: pretrained.Source, declared: Params, *, grown: bool
) -> Adaptation:
    """What the sections ask for; none is full fine-tuning.

    `grown`: tokens were added, so that their rows must train.
    """
    if not sections:
        return Adaptation(full, ())
    transforms, whole, adapted = [], [], declared
    for section in sections:
        if section.from_ is not None:
            adapter = pretrained.load_adapter(section.from_, source.config, dropout=section.dropout)
            transforms.append(adapter.transform)
            whole += adapter.whole
        else:
            transforms.append(METHODS[type(section)](section, adapted))
        adapted = transforms[-1].apply(adapted, transforms[-1].init(adapted))
    rules = [rule for section in sections if section.from_ is None for rule in section.modules_to_save]
    own = select_whole(declared, [*rules, *(("embed_tokens", "lm_head") if grown else ())])
    return Adaptation(chain(*transforms, train_whole(own)), tuple(dict.fromkeys([*whole, *own])))


def learning_rates(sections: Sequence[Any]) -> Callable[[str], float]:
    """The path of a trainable leaf -> its learning rate in those of the optimizer: LoRA+'s own for b."""
    rates = {section.b_rate for section in sections if isinstance(section, LowRankSection)}
    if len(rates) > 1:
        raise LlmtuneConfigError("adapt.b_rate: sections differ in it; give all the same")
    rate = rates.pop() if rates else 1.0
    return lambda path: rate if path.rsplit("/", 1)[-1] == "b" else 1.0
