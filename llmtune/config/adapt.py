"""The `adapt` section: one method, or a list of them applied in order; each method has a small dataclass of its own.

    adapt: {rank: 8}                                    method lora, where none is named
    adapt: [{method: lora, targets: attention}, ...]    a list

A new method is a dataclass here (those that add to the computation: in `llmtune/config/added.py`), its transform in
`llmtune/transforms`, and a row in `llmtune/training/adapting.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from llmtune.config.added import (
    FROM,
    SAVED,
    AdapterFusion,
    Houlsby,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Require,
    check_continued,
)
from llmtune.config.key import key

TARGETS = "all-linear, attention, mlp, experts, names such as q_proj, or regular expressions on paths"
DROPOUT = "share of the adapter's input that is dropped in each training step"


@dataclass(frozen=True)
class LowRankSection:
    """What the methods with low-rank factors share."""

    method: str
    rank: int = key("of the low-rank factors", 16)
    alpha: float = key("scale of the adapter: alpha / rank", 32)
    targets: str | list[str] = key(TARGETS, "all-linear")
    rslora: bool = key("scale by alpha / sqrt(rank) instead", False)
    dropout: float = key(DROPOUT, 0.0)
    rank_pattern: dict[str, int] = key("other ranks, e.g. {q_proj: 4}; its keys are written like targets", {})
    alpha_pattern: dict[str, float] = key("other alphas, likewise", {})
    layers: list[int] | None = key("only these layers are adapted, counted from 0; null: all", None)
    initial: Literal["default", "gaussian", "pissa", "olora", "loftq"] = key(
        "factors begin with noise (default: uniform, or gaussian) and zeros; or with a part of the weight: its largest singular "
        "values (pissa), its QR (olora), or what the quantised base lacks of it (loftq)",
        "default",
    )
    loftq_iterations: int = key(
        "of initial: loftq, how often codes and factors are found in turn; more than 1 change the codes, and the run exports the "
        "base that its adapter stands on",
        1,
    )
    untie: bool = key("give a tied head weights of its own, so that embed_tokens or lm_head can be adapted", False)
    ensure_weight_tying: bool = key("of a tied model: embed_tokens and lm_head share one adapter, and stay tied", False)
    b_rate: float = key("LoRA+: the learning rate of b, in learning rates", 1.0)
    modules_to_save: list[str] = key(SAVED, [])
    from_: str | None = key(FROM, None, alias="from")

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.rank > 0, f"{at}.rank", f"{self.rank} must be positive")
        require(0 < self.alpha < math.inf, f"{at}.alpha", f"{self.alpha} must be a positive number")
        require(0 < self.b_rate < math.inf, f"{at}.b_rate", f"{self.b_rate} must be a positive number")
        for rule, rank in self.rank_pattern.items():
            require(rank > 0, f"{at}.rank_pattern.{rule}", f"{rank} must be positive")
        for rule, alpha in self.alpha_pattern.items():
            require(0 < alpha < math.inf, f"{at}.alpha_pattern.{rule}", f"{alpha} must be a positive number")
        require(
            not (self.untie and self.ensure_weight_tying),
            f"{at}.ensure_weight_tying",
            "untie parts the ends that it ties; leave one of them out",
        )
        require(self.layers is None or len(self.layers) > 0, f"{at}.layers", "no layer is given")
        require(self.loftq_iterations > 0, f"{at}.loftq_iterations", f"{self.loftq_iterations} must be positive")
        require(
            self.loftq_iterations == 1 or self.initial == "loftq",
            f"{at}.loftq_iterations",
            "there is nothing to alternate; set initial: loftq, or leave it out",
        )
        _check_shared(self, require, at)


@dataclass(frozen=True)
class Lora(LowRankSection):
    """Low-rank factors beside frozen matrices."""

    method: Literal["lora"] = key("which transform", "lora")


@dataclass(frozen=True)
class Dora(LowRankSection):
    """LoRA on the directions of a matrix's columns, their lengths trained apart."""

    method: Literal["dora"] = key("which transform", "dora")


@dataclass(frozen=True)
class Ia3:
    """Vectors that stretch keys, values and the hidden layer of the MLP."""

    method: Literal["ia3"] = key("which transform", "ia3")
    targets: str | list[str] = key(TARGETS, ["k_proj", "v_proj", "down_proj"])
    feedforward: str | list[str] | None = key(
        "those of the targets whose input is stretched, not their output; null: down_proj, where it is a target", None
    )
    modules_to_save: list[str] = key(SAVED, [])
    from_: str | None = key(FROM, None, alias="from")

    dropout: ClassVar[float] = 0.0

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        _check_shared(self, require, at)


@dataclass(frozen=True)
class Vera:
    """Two vectors for each matrix, between random projections that all share."""

    method: Literal["vera"] = key("which transform", "vera")
    rank: int = key("of the projections", 256)
    targets: str | list[str] = key(TARGETS, "all-linear")
    d_initial: float = key("where the inner vectors begin", 0.1)
    dropout: float = key(DROPOUT, 0.0)
    modules_to_save: list[str] = key(SAVED, [])
    from_: str | None = key(FROM, None, alias="from")

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.rank > 0, f"{at}.rank", f"{self.rank} must be positive")
        require(math.isfinite(self.d_initial), f"{at}.d_initial", f"{self.d_initial} must be a number")
        _check_shared(self, require, at)


@dataclass(frozen=True)
class Full:
    """No adapter: the model's own weights train, all of them or those that rules name."""

    method: Literal["full"] = key("which transform", "full")
    train: str | list[str] = key(
        "all, or names such as q_proj, embed_tokens, norm, or regular expressions on paths", "all"
    )
    freeze: list[str] = key("of those, what stays, written likewise", [])
    freeze_layers: int | list[int] = key("layers that stay, counted from 0; or how many, from the lowest", 0)

    dropout: ClassVar[float] = 0.0
    modules_to_save: ClassVar[Sequence[str]] = ()
    from_: ClassVar[None] = None

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(bool(self.train), f"{at}.train", "no weight is given")
        layers = [self.freeze_layers] if isinstance(self.freeze_layers, int) else self.freeze_layers
        require(all(number >= 0 for number in layers), f"{at}.freeze_layers", f"{self.freeze_layers} must be 0 or more")


Method = (  # the first is the default
    Lora
    | Dora
    | Ia3
    | Vera
    | Full
    | PromptTuning
    | PTuning
    | PrefixTuning
    | Houlsby
    | Pfeiffer
    | ParallelAdapter
    | AdapterFusion
)
METHODS: dict[str, type] = {kind.method: kind for kind in get_args(Method)}
Adapt = Method | list[Method]


def sections(adapt: Any) -> Sequence[Any]:
    """The sections of a run in the order in which they are applied; none is full fine-tuning."""
    return () if adapt is None else adapt if isinstance(adapt, list) else (adapt,)


def has_adapter(adapt: Any) -> bool:
    """Whether anything but the model's own weights trains, so that there is an adapter to export."""
    return any(not isinstance(section, Full) for section in sections(adapt))


def unties(adapt: Any) -> bool:
    """Whether a tied head gets weights of its own."""
    return any(isinstance(section, LowRankSection) and section.untie for section in sections(adapt))


def changes_codes(adapt: Any) -> bool:
    """Whether the base under the adapter is no longer the quantised base that everybody has."""
    return any(isinstance(section, LowRankSection) and section.loftq_iterations > 1 for section in sections(adapt))


def places(adapt: Any) -> list[tuple[str, Any]]:
    """[(`adapt` or `adapt.0`, section)]: where each stands in the file."""
    listed = isinstance(adapt, list)
    return [(f"adapt.{number}" if listed else "adapt", own) for number, own in enumerate(sections(adapt))]


def check_adapt(adapt: Any, require: Require) -> None:
    """What the sections say of themselves and of each other."""
    require(not isinstance(adapt, list) or bool(adapt), "adapt", "the list is empty; leave it out for full fine-tuning")
    for at, section in places(adapt):
        section.check(require, at)
        require(
            not isinstance(section, Full) or len(sections(adapt)) == 1,
            at,
            "full trains the model's own weights, which no other method goes with; leave one of them out",
        )
    methods = sorted({section.method for section in sections(adapt)})
    require(
        len(methods) <= 1,
        "adapt",
        f"{' and '.join(methods)} fit no one PEFT directory; give all sections the same method",
    )
    scaled = {section.rslora for section in sections(adapt) if isinstance(section, LowRankSection)}
    require(
        len(scaled) <= 1, "adapt", "rslora differs among the sections, which no PEFT directory says; give all the same"
    )


def _check_shared(section: Any, require: Require, at: str) -> None:
    require(bool(section.targets), f"{at}.targets", "no target is given")
    require(0 <= section.dropout < 1, f"{at}.dropout", f"{section.dropout} must lie in [0, 1)")
    check_continued(section, require, at)
