"""From the `adapt` sections of a run to one transform: a table of methods, chained in the order of the file.

    [Lora(rank=8), ...]  -->  Adaptation(chain(lora(rank=8, ...), ...), paths that train in whole beside them)

A new method is a dataclass in `llmtune/config/adapt.py`, a transform in `llmtune/transforms`, and a row here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmtune import pretrained
from llmtune.config.adapt import (
    AdapterFusion,
    Dora,
    Full,
    Houlsby,
    Ia3,
    Lora,
    LowRankSection,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Vera,
)
from llmtune.errors import LlmtuneConfigError
from llmtune.tokenizers import load_tokenizer
from llmtune.training.freezing import stacks
from llmtune.transforms import (
    INITIAL,
    NOISE,
    Params,
    Toward,
    Transform,
    chain,
    dora,
    full,
    fusion_of,
    ia3,
    kaiming,
    lora,
    not_mergeable,
    p_tuning,
    parallel_adapters,
    prefix_tuning,
    prompt_tuning,
    select_whole,
    sequential_adapters,
    train_whole,
    vera,
    weights_by_path,
)
from llmtune.weights import beneath, is_adapter

# (section, declared weights that it is applied to, where the model comes from) -> transform
MakeTransform = Callable[[Any, Params, pretrained.Source], Transform]


def _low_rank(make: Callable[..., Transform]) -> MakeTransform:
    fields = (
        "rank",
        "alpha",
        "targets",
        "rslora",
        "dropout",
        "rank_pattern",
        "alpha_pattern",
        "layers",
        "ensure_weight_tying",
    )

    def of_section(section: LowRankSection, declared: Params, source: pretrained.Source) -> Transform:
        del declared
        return make(
            **{name: getattr(section, name) for name in fields},
            noise=NOISE.get(section.initial, kaiming),
            initial=INITIAL.get(section.initial),
            toward=Toward(pretrained.stored_matrices(source), section.loftq_iterations)
            if section.initial == "loftq"
            else None,
        )

    return of_section


def _ia3(section: Ia3, declared: Params, source: pretrained.Source) -> Transform:
    del declared, source
    return ia3(targets=section.targets, feedforward=section.feedforward)


def _vera(section: Vera, declared: Params, source: pretrained.Source) -> Transform:
    del declared, source
    return vera(rank=section.rank, targets=section.targets, d_initial=section.d_initial, dropout=section.dropout)


def _full(section: Full, declared: Params, source: pretrained.Source) -> Transform:
    rules = [section.train] if isinstance(section.train, str) else section.train
    chosen = weights_by_path(declared) if rules == ["all"] else select_whole(declared, rules, key="adapt.train")
    stays = select_whole(declared, section.freeze, key="adapt.freeze")
    cut = stacks([section], source.config.num_hidden_layers)
    still = tuple(f"layers/{number}/" for number, stack in enumerate(cut) if stack.frozen)
    left = [path for path in chosen if path not in stays and not path.startswith(still)]
    if not left:
        raise LlmtuneConfigError("adapt.freeze: nothing is left to train; leave out a rule, or a layer")
    return train_whole(left)


def _prompt_tuning(section: PromptTuning, declared: Params, source: pretrained.Source) -> Transform:
    del declared
    text: list[int] = []
    if section.initial_text is not None:
        home = source.tokenizer_directory
        tokenizer = None if home is None else load_tokenizer(home)
        if tokenizer is None:
            raise LlmtuneConfigError(
                f"adapt.initial_text: {source.name} has no tokenizer to read it with; leave it out"
            )
        text = tokenizer.encode(section.initial_text, bos=tokenizer.add_bos)
    return prompt_tuning(virtual_tokens=section.virtual_tokens, text=text)


def _p_tuning(section: PTuning, declared: Params, source: pretrained.Source) -> Transform:
    del declared, source
    fields = ("virtual_tokens", "encoder", "encoder_hidden")
    return p_tuning(**{name: getattr(section, name) for name in fields})


def _prefix_tuning(section: PrefixTuning, declared: Params, source: pretrained.Source) -> Transform:
    del declared, source
    return prefix_tuning(virtual_tokens=section.virtual_tokens)


def _sequential(section: Houlsby | Pfeiffer, declared: Params, source: pretrained.Source) -> Transform:
    del declared, source
    return sequential_adapters(section.method, size=section.size)


def _parallel(section: ParallelAdapter, declared: Params, source: pretrained.Source) -> Transform:
    del declared, source
    return parallel_adapters(size=section.size, scale=section.scale)


def _fusion(section: AdapterFusion, declared: Params, source: pretrained.Source) -> Transform:
    del declared
    return fusion_of([pretrained.read_branches(path, source.config) for path in section.adapters])


DEFAULT = Lora.method
METHODS: dict[type, MakeTransform] = {
    Lora: _low_rank(lora),
    Dora: _low_rank(dora),
    Ia3: _ia3,
    Vera: _vera,
    Full: _full,
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
    for number, section in enumerate(sections):
        at = f"adapt.{number}" if len(sections) > 1 else "adapt"
        with _named(at):
            transform, brought = _of_section(section, source, adapted)
            adapted = transform.apply(adapted, transform.init(adapted))
        transforms.append(transform)
        whole += brought
        _refuse_twice(adapted, at)
    alone = not_mergeable(adapted)
    if alone is not None and len(sections) > 1:
        raise LlmtuneConfigError(
            f"adapt: {alone[1]} in {alone[0]} cannot be merged, and no adapter directory holds two methods; train the other one "
            "first, and this one over its merged export"
        )
    rules = [rule for section in sections if section.from_ is None for rule in section.modules_to_save]
    own = select_whole(declared, [*rules, *(("embed_tokens", "lm_head") if grown else ())])
    return Adaptation(chain(*transforms, train_whole(own)), tuple(dict.fromkeys([*whole, *own])), adapted)


def _of_section(section: Any, source: pretrained.Source, adapted: Params) -> tuple[Transform, tuple[str, ...]]:
    """The transform of one section, and the paths of the weights that the adapter it continues brings in whole."""
    if section.from_ is None:
        return METHODS[type(section)](section, adapted, source), ()
    adapter = pretrained.load_adapter(section.from_, source.config, dropout=section.dropout)
    if section.method not in (DEFAULT, adapter.method):
        raise LlmtuneConfigError(f"adapt.from: {section.from_} holds {adapter.method}; write method: {adapter.method}")
    return adapter.transform, adapter.whole


@contextmanager
def _named(at: str) -> Iterator[None]:
    """What a transform says of `adapt`, said of the section that asked for it."""
    try:
        yield
    except LlmtuneConfigError as error:
        if not str(error).startswith("adapt."):
            raise
        raise LlmtuneConfigError(f"{at}.{str(error).removeprefix('adapt.')}") from None


def _refuse_twice(adapted: Params, at: str) -> None:
    """An adapter under another one would be a part of the base, and not train."""
    twice = [path for path, own in weights_by_path(adapted).items() if is_adapter(own) and is_adapter(beneath(own))]
    if twice:
        raise LlmtuneConfigError(
            f"{at}: {twice[0]} has an adapter of another section already; give each weight one, or merge the first"
        )


def learning_rates(sections: Sequence[Any]) -> Callable[[str], float]:
    """The path of a trainable leaf -> its learning rate in those of the optimizer: LoRA+'s own for b."""
    rates = {section.b_rate for section in sections if isinstance(section, LowRankSection)}
    if len(rates) > 1:
        raise LlmtuneConfigError("adapt.b_rate: sections differ in it; give all the same")
    rate = rates.pop() if rates else 1.0
    return lambda path: rate if path.rsplit("/", 1)[-1] == "b" else 1.0
