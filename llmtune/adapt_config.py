"""The `adapt` section: one method, or a list of them applied in order; each method has a small dataclass of its own.

    adapt: {rank: 8}                                    method lora, where none is named
    adapt: [{method: lora, targets: attention}, ...]    a list

A new method is a dataclass here, its transform in `llmtune/transforms`, and a row in `llmtune/training/adapting.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llmtune.config_key import key

Require = Callable[[bool, str, str], None]  # (condition, key, what is said where it does not hold)
SAVED = (
    "trained in whole beside it: embed_tokens, lm_head, model.norm, ... (those two by themselves with data.add_tokens)"
)
TARGETS = "all-linear, attention, mlp, names such as q_proj, or regular expressions on paths"


@dataclass(frozen=True)
class Lora:
    """Low-rank factors beside frozen matrices."""

    method: Literal["lora"] = key("which transform", "lora")
    rank: int = key("of the low-rank factors", 16)
    alpha: float = key("scale of the adapter: alpha / rank", 32)
    targets: str | list[str] = key(TARGETS, "all-linear")
    rslora: bool = key("scale by alpha / sqrt(rank) instead", False)
    modules_to_save: list[str] = key(SAVED, [])
    from_: str | None = key(
        "a PEFT directory to continue: its rank, alpha, targets and modules_to_save hold", None, alias="from"
    )

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.rank > 0, f"{at}.rank", f"{self.rank} must be positive")
        require(0 < self.alpha < math.inf, f"{at}.alpha", f"{self.alpha} must be a positive number")
        require(bool(self.targets), f"{at}.targets", "no target is given")


FROM = "a directory that save_adapter or peft wrote, to continue: what it says holds"


@dataclass(frozen=True)
class Continued:
    """What every method has: an adapter to continue, and weights that train in whole beside it."""

    modules_to_save: list[str] = key(SAVED, [])
    from_: str | None = key(FROM, None, alias="from")


@dataclass(frozen=True)
class PromptTuning(Continued):
    """Learned vectors before the embeddings of every row."""

    method: Literal["prompt_tuning"] = key("which transform", "prompt_tuning")
    virtual_tokens: int = key("how many", 20)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.virtual_tokens > 0, f"{at}.virtual_tokens", f"{self.virtual_tokens} must be positive")


@dataclass(frozen=True)
class PTuning(Continued):
    """A prompt that a small network makes, which trains with it."""

    method: Literal["p_tuning"] = key("which transform", "p_tuning")
    virtual_tokens: int = key("how many", 20)
    encoder_hidden: int | None = key("width of the network; null: the model's", None)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.virtual_tokens > 0, f"{at}.virtual_tokens", f"{self.virtual_tokens} must be positive")
        width = self.encoder_hidden
        require(width is None or width > 0, f"{at}.encoder_hidden", f"{width} must be positive")


@dataclass(frozen=True)
class PrefixTuning(Continued):
    """Learned keys and values before those of every row, in each layer."""

    method: Literal["prefix_tuning"] = key("which transform", "prefix_tuning")
    virtual_tokens: int = key("how many", 20)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.virtual_tokens > 0, f"{at}.virtual_tokens", f"{self.virtual_tokens} must be positive")


@dataclass(frozen=True)
class Houlsby(Continued):
    """Bottlenecks after attention and after the MLP of each layer."""

    method: Literal["houlsby"] = key("which transform", "houlsby")
    size: int = key("width of the bottlenecks", 16)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.size > 0, f"{at}.size", f"{self.size} must be positive")


@dataclass(frozen=True)
class Pfeiffer(Continued):
    """A bottleneck after the MLP of each layer."""

    method: Literal["pfeiffer"] = key("which transform", "pfeiffer")
    size: int = key("width of the bottlenecks", 16)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.size > 0, f"{at}.size", f"{self.size} must be positive")


@dataclass(frozen=True)
class ParallelAdapter(Continued):
    """A bottleneck beside the MLP of each layer."""

    method: Literal["parallel_adapter"] = key("which transform", "parallel_adapter")
    size: int = key("width of the bottlenecks", 16)
    scale: float = key("of what they add", 4.0)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        require(self.size > 0, f"{at}.size", f"{self.size} must be positive")
        require(0 < self.scale < math.inf, f"{at}.scale", f"{self.scale} must be a positive number")


@dataclass(frozen=True)
class AdapterFusion(Continued):
    """Learned attention over several trained bottleneck adapters, which stay as they are."""

    method: Literal["fusion"] = key("which transform", "fusion")
    adapters: list[str] = key("directories of adapters of method houlsby or pfeiffer, two or more", [])

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        given = len(self.adapters)
        require(given > 1 or self.from_ is not None, f"{at}.adapters", f"{given} given; fusion is of two or more")


Method = Lora | PromptTuning | PTuning | PrefixTuning | Houlsby | Pfeiffer | ParallelAdapter | AdapterFusion
VIRTUAL = (PromptTuning, PTuning, PrefixTuning)  # methods whose rows begin with virtual tokens
METHODS: dict[str, type] = {kind.method: kind for kind in get_args(Method)}
Adapt = Method | list[Method]


def sections(adapt: Any) -> Sequence[Any]:
    """The sections of a run in the order in which they are applied; none is full fine-tuning."""
    return () if adapt is None else adapt if isinstance(adapt, list) else (adapt,)


def places(adapt: Any) -> list[tuple[str, Any]]:
    """[(`adapt` or `adapt.0`, section)]: where each stands in the file."""
    listed = isinstance(adapt, list)
    return [(f"adapt.{number}" if listed else "adapt", own) for number, own in enumerate(sections(adapt))]


def check_adapt(adapt: Any, require: Require) -> None:
    """What the sections say of themselves, and of continuing an adapter."""
    require(not isinstance(adapt, list) or bool(adapt), "adapt", "the list is empty; leave it out for full fine-tuning")
    for at, section in places(adapt):
        section.check(require, at)
        require(
            section.from_ is None or not section.modules_to_save,
            f"{at}.modules_to_save",
            f"the adapter that {at}.from names says this; leave it out",
        )
