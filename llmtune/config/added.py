"""Sections of `adapt` for what adds to the computation: virtual tokens, bottlenecks, their fusion (see docs/adapters.md)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from llmtune.config.key import key

Require = Callable[[bool, str, str], None]  # (condition, key, what is said where it does not hold)
SAVED = (
    "trained in whole beside it: embed_tokens, lm_head, model.norm, ... (those two by themselves with data.add_tokens)"
)
FROM = "a PEFT directory to continue: its method, rank, alpha, targets and modules_to_save hold"


def check_continued(section: Any, require: Require, at: str) -> None:
    """What holds for the sections of all methods that can continue an adapter."""
    require(
        section.from_ is None or not section.modules_to_save,
        f"{at}.modules_to_save",
        f"the adapter that {at}.from names says this; leave it out",
    )


@dataclass(frozen=True)
class Continued:
    """What every method has: an adapter to continue, and weights that train in whole beside it."""

    modules_to_save: list[str] = key(SAVED, [])
    from_: str | None = key(FROM, None, alias="from")

    dropout: ClassVar[float] = 0.0


@dataclass(frozen=True)
class VirtualTokens(Continued):
    """Methods whose rows begin with virtual tokens."""

    virtual_tokens: int = key("how many", 20)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        check_continued(self, require, at)
        require(self.virtual_tokens > 0, f"{at}.virtual_tokens", f"{self.virtual_tokens} must be positive")


@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """Learned vectors before the embeddings of every row."""

    method: Literal["prompt_tuning"] = key("which transform", "prompt_tuning")
    initial_text: str | None = key(
        "they begin as its embeddings, cut or repeated to their number; null: as noise", None
    )

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        super().check(require, at)
        require(self.initial_text != "", f"{at}.initial_text", "the text is empty; leave it out to begin with noise")


@dataclass(frozen=True)
class PTuning(VirtualTokens):
    """A prompt that a small network makes, which trains with it."""

    method: Literal["p_tuning"] = key("which transform", "p_tuning")
    encoder: Literal["mlp", "lstm"] = key("two hidden layers, or an LSTM that reads both ways", "mlp")
    encoder_hidden: int | None = key("width of the network; null: the model's", None)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        super().check(require, at)
        width = self.encoder_hidden
        require(width is None or width > 0, f"{at}.encoder_hidden", f"{width} must be positive")


@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    """Learned keys and values before those of every row, in each layer."""

    method: Literal["prefix_tuning"] = key("which transform", "prefix_tuning")


@dataclass(frozen=True)
class Bottlenecks(Continued):
    """Methods that add small networks of two layers."""

    size: int = key("width of the bottlenecks", 16)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        check_continued(self, require, at)
        require(self.size > 0, f"{at}.size", f"{self.size} must be positive")


@dataclass(frozen=True)
class Houlsby(Bottlenecks):
    """Bottlenecks after attention and after the MLP of each layer."""

    method: Literal["houlsby"] = key("which transform", "houlsby")


@dataclass(frozen=True)
class Pfeiffer(Bottlenecks):
    """A bottleneck after the MLP of each layer."""

    method: Literal["pfeiffer"] = key("which transform", "pfeiffer")


@dataclass(frozen=True)
class ParallelAdapter(Bottlenecks):
    """A bottleneck beside the MLP of each layer."""

    method: Literal["parallel_adapter"] = key("which transform", "parallel_adapter")
    scale: float = key("of what they add", 4.0)

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        super().check(require, at)
        require(0 < self.scale < math.inf, f"{at}.scale", f"{self.scale} must be a positive number")


@dataclass(frozen=True)
class AdapterFusion(Continued):
    """Learned attention over several trained bottleneck adapters, which stay as they are."""

    method: Literal["fusion"] = key("which transform", "fusion")
    adapters: list[str] = key("directories of adapters of method houlsby or pfeiffer, two or more", [])

    def check(self, require: Require, at: str) -> None:
        """What no single field can say."""
        check_continued(self, require, at)
        given = len(self.adapters)
        require(given > 1 or self.from_ is not None, f"{at}.adapters", f"{given} given; fusion is of two or more")
