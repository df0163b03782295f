"""How the frozen base is kept: the keys under `quantize`."""

from dataclasses import dataclass
from typing import Literal

from llmtune.config.key import key


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
