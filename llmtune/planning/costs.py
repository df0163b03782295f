"""FLOPs and memory traffic of one train step, in closed form: a compiler counts the body of a scan once, and kernels not at all.

    a product x @ W with W [in, out], per token         forward 2 in out, towards x 2 in out, towards W 2 in out if it trains
    attention of one token that sees n others, on average   forward 4 n heads head_dim, backward twice that

What is *model* work counts what the method asks for: no gradient of a frozen weight, attention of causal rows halved and cut
to its window. *Computed* adds what is done twice: the blocks' forward pass under remat, the head's logits where the head
trains, and the scores that attention's backward kernels form anew. Rows are taken as one document each, the most there can be.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from llmtune.inspection import attention_flops
from llmtune.models.config import ModelConfig
from llmtune.transforms import combine, weights_by_path
from llmtune.weights import is_operator

FORWARD_AGAIN = {
    "offload": True,
    "block": True,
    "attention": True,
    "dots": False,
    "none": False,
}  # whether products of a block are formed twice
ATTENTION_AGAIN = {"offload": True, "block": True, "attention": False, "dots": True, "none": False}
SCORES_AGAIN = (
    1.5  # of the forward pass: the backward kernels form the scores, and their gradient, once for each of their outputs
)


@dataclass(frozen=True)
class Product:
    """One matrix product of the model: `uses` of a matrix [n_in, n_out] by every token (experts: by those it chooses)."""

    path: str
    n_in: int
    n_out: int
    uses: float
    trains: bool
    in_block: bool

    @property
    def size(self) -> float:
        """Multiplications per token."""
        return self.n_in * self.n_out * self.uses


@dataclass(frozen=True)
class Costs:
    """Of one step over all devices: FLOPs, and bytes that devices read and write in their memories, summed over them."""

    model_flops: float
    computed_flops: float
    memory_bytes: float


def products(config: ModelConfig, trainable: Any, frozen: Any) -> Iterator[Product]:
    """Every product with a weight or with a part of an adapter. Weights are arrays, or shapes."""
    whole = weights_by_path(combine(trainable, frozen))
    trains = {path for path, own in weights_by_path(trainable).items() if not is_operator(own) and own is not None}
    for path, weight in whole.items():
        stacked = path.startswith("layers/")
        if path.endswith("kernel") or (path == "embed/table" and config.tie_word_embeddings):
            *lead, n_in, n_out = weight.shape
            yield Product(path, n_in, n_out, _uses(config, path, lead), path in trains, stacked)
        if is_operator(weight):
            for leaf in _trained_matrices(weight):
                *lead, n_in, n_out = leaf.shape
                yield Product(f"{path}/adapter", n_in, n_out, _uses(config, path, lead), True, stacked)


def step_costs(
    config: ModelConfig, trainable: Any, frozen: Any, *, rows: int, length: int, remat: str, itemsize: int
) -> Costs:
    """Of a step of `rows` rows of `length` tokens, activations of `itemsize` bytes."""
    tokens, model, again, moved = rows * length, 0.0, 0.0, 0.0
    for own in products(config, trainable, frozen):
        passes = 3 if own.trains else 2
        repeated = FORWARD_AGAIN[remat] if own.in_block else own.trains
        repeated = repeated and not own.path.endswith("down/kernel")  # what a block returns is not needed to go back
        model += 2 * own.size * passes
        again += 2 * own.size * repeated
        moved += (own.n_in + own.n_out) * own.uses * itemsize * (passes + repeated)
    attention = attention_flops(config, length)
    model += 3 * attention
    again += attention * (SCORES_AGAIN + ATTENTION_AGAIN[remat])
    hidden = (
        8 * config.hidden_size * config.num_hidden_layers * itemsize
    )  # norms and residuals, read and written, both ways
    return Costs(model * tokens, (model + again) * tokens, (moved + hidden) * tokens)


def _uses(config: ModelConfig, path: str, lead: list[int]) -> float:
    if config.experts is None or "/experts/" not in path:
        return math.prod(lead)
    return math.prod(lead) * config.experts.num_experts_per_tok / config.experts.num_local_experts


def _trained_matrices(weight: Any) -> Iterator[Any]:
    """The arrays of an operator that train and are matrices, those of operators that it is built on included."""
    for field in fields(weight):
        own = getattr(weight, field.name)
        if is_operator(own):
            yield from _trained_matrices(own)
        elif field.name in weight.trainable and own is not None and own.ndim >= 2:
            yield own
