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


Method = Lora  # the union of all of them
METHODS: dict[str, type] = {kind.method: kind for kind in (get_args(Method) or (Method,))}  # type: ignore[attr-defined]
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
