"""How the frozen base is kept: the keys under `quantize`, one section or a list of them, each for its own matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key

Require = Callable[[bool, str, str], None]  # (condition, key, what is said where it does not hold)


@dataclass(frozen=True)
class Quantize:
    """The frozen base kept in few bits; absent: as it is stored. Takes an adapter, which is what trains."""

    base: Literal["nf4", "int4", "int8", "fp8"] = key("how each number is kept; see docs/quantization.md", "nf4")
    double: bool = key("nf4: the blocks' magnitudes in 8 bits too (4.13 bits per number instead of 4.5)", True)
    targets: str | list[str] = key(
        "layers (all matrices of the layers, experts too), or as adapt.targets; the embedding is never quantised",
        "layers",
    )
    merge_into: Literal["dequantized", "original"] = key(
        "what the exported model's adapter is merged into: the numbers it trained on, or those of the base as stored",
        "dequantized",
    )


def kept(quantize: Quantize | list[Quantize] | None) -> Sequence[Quantize]:
    """The sections in the order of the file; none: the base as it is stored."""
    return () if quantize is None else quantize if isinstance(quantize, list) else (quantize,)


def check_quantize(quantize: Quantize | list[Quantize] | None, require: Require) -> None:
    """What the sections say of themselves and of each other."""
    require(not isinstance(quantize, list) or bool(quantize), "quantize", "the list is empty; leave it out for none")
    for number, own in enumerate(kept(quantize)):
        at = f"quantize.{number}" if isinstance(quantize, list) else "quantize"
        require(bool(own.targets), f"{at}.targets", "no target is given")
    require(
        len({own.merge_into for own in kept(quantize)}) <= 1,
        "quantize",
        "merge_into differs among the sections; give all the same",
    )


def check_loftq(quantize: Quantize | list[Quantize] | None, at: str, require: Require) -> None:
    """The factors of LoftQ (asked for at the key `at`) make up for codes, which must therefore be there, and stay."""
    require(bool(kept(quantize)), at, "loftq makes up for a quantised base; give quantize, or another beginning")
    require(
        all(own.merge_into == "dequantized" for own in kept(quantize)),
        "quantize.merge_into",
        f"original: the factors of {at} loftq make up for the codes, which it would leave out; merge into dequantized",
    )
