"""From the `adapt` sections of a run to one transform: a table of methods, chained in the order of the file.

    [Lora(rank=8), ...]  -->  Adaptation(chain(lora(rank=8, ...), ...), paths that train in whole beside them)

A new method is a dataclass in `llmtune/adapt_config.py`, a transform in `llmtune/transforms`, and a row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune import pretrained
from llmtune.adapt_config import Lora
from llmtune.transforms import Params, Transform, chain, full, lora, select_whole, train_whole

MakeTransform = Callable[[Any, Params], Transform]  # (section, declared weights that it is applied to) -> transform


def _lora(section: Lora, declared: Params) -> Transform:
    return lora(rank=section.rank, alpha=section.alpha, targets=section.targets, rslora=section.rslora)


METHODS: dict[type, MakeTransform] = {Lora: _lora}


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
            adapter = pretrained.load_adapter(section.from_, source.config)
            transforms.append(adapter.transform)
            whole += adapter.whole
        else:
            transforms.append(METHODS[type(section)](section, adapted))
        adapted = transforms[-1].apply(adapted, transforms[-1].init(adapted))
    rules = [rule for section in sections if section.from_ is None for rule in section.modules_to_save]
    own = select_whole(declared, [*rules, *(("embed_tokens", "lm_head") if grown else ())])
    return Adaptation(chain(*transforms, train_whole(own)), tuple(dict.fromkeys([*whole, *own])))
