"""What LoRA and its relatives share: which matrices, of which rank and scale, and the factors declared for them.

    LowRank(rank=8, targets="attention", rank_pattern={"q_proj": 4})  --plan-->  {path: Plan(rank, scale, adapted)}

The factors' logical axes follow from the base's: a takes its input axis, b its output axis, both its leading axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms.select import EMBEDDING, HEAD, select, weights_by_path
from llmtune.transforms.transform import Params
from llmtune.weights import ArraySpec, Initializer, constant, is_operator, normal, path_name, uniform

Noise = Callable[[int, int], Initializer]  # (in, rank) -> how a begins


def kaiming(n_in: int, rank: int) -> Initializer:
    """With slope sqrt(5), as peft draws it: within 1 / sqrt(in)."""
    del rank
    return uniform(n_in**-0.5)


def gaussian(n_in: int, rank: int) -> Initializer:
    """Of deviation 1 / rank, as peft's `init_lora_weights: gaussian` draws it."""
    del n_in
    return normal(1 / rank)


NOISE: dict[str, Noise] = {"gaussian": gaussian}  # by the names that configurations use, where it is not the default


@dataclass(frozen=True)
class LowRank:
    """How factors are chosen. A rule of a pattern is one of `targets`; the first that matches a path holds.

    `layers`: only these layers of a stack are adapted (None: all); the others' factors and scale are zero, and stay so.
    `ensure_weight_tying`: the table of a tied model may be adapted, for both its uses.
    """

    rank: int
    alpha: float
    targets: str | Sequence[str] = "all-linear"
    noise: Noise = kaiming
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    ensure_weight_tying: bool = False


@dataclass(frozen=True)
class Plan:
    """Of one weight; `adapted`: which layers of the stack are, where not all; `key`: of the configuration, that says the rank."""

    rank: int
    scale: float
    adapted: tuple[bool, ...] | None
    key: str
    noise: Noise = kaiming


def plan(declared: Params, choice: LowRank) -> dict[str, Plan]:
    """By path, in tree order."""
    weights = weights_by_path(declared)
    both = choice.ensure_weight_tying
    if both and HEAD in weights:
        raise LlmtuneConfigError(
            "adapt.ensure_weight_tying: this model's head is not tied to its embedding; leave it out"
        )
    ranks = _by_rule(declared, choice.rank_pattern, "adapt.rank_pattern", both)
    alphas = _by_rule(declared, choice.alpha_pattern, "adapt.alpha_pattern", both)
    plans = {}
    for path in select(declared, choice.targets, both_ends=both):
        key, rank = ranks.get(path, ("adapt.rank", choice.rank))
        _, alpha = alphas.get(path, ("adapt.alpha", choice.alpha))
        scale = alpha / math.sqrt(rank) if choice.rslora else alpha / rank
        plans[path] = Plan(rank, scale, adapted_layers(path, weights[path], choice.layers), key, choice.noise)
    return plans


def declare_factors(
    path: str, base: Any, rank: int, scale: float, *, noise: Noise = kaiming, key: str = "adapt.rank"
) -> dict[str, ArraySpec]:
    """A (noise), b (zero) and scale.

    Of an embedding it is the other way round: a row of a is what a token adds. A rank that does not fit is an error that
    names `key`.
    """
    (*lead, n_in, n_out), (*lead_axes, in_axis, out_axis) = base.shape, base.axes
    if rank < 1 or rank > min(n_in, n_out):
        raise LlmtuneConfigError(
            f"{key}: {rank} does not fit {path}, a matrix of {n_in} x {n_out}; choose 1 to {min(n_in, n_out)}"
        )
    first, second = (constant(0.0), normal(1.0)) if path == EMBEDDING else (noise(n_in, rank), constant(0.0))
    return {
        "a": ArraySpec((*lead, n_in, rank), (*lead_axes, in_axis, "rank"), init=first),
        "b": ArraySpec((*lead, rank, n_out), (*lead_axes, "rank", out_axis), init=second),
        "scale": ArraySpec(tuple(lead), tuple(lead_axes), init=constant(scale)),
    }


def only_layers(specs: dict[str, ArraySpec], on: Sequence[bool]) -> dict[str, ArraySpec]:
    """The same arrays, zero in the layers that are not adapted."""

    def masked(init: Initializer) -> Initializer:
        mask = np.asarray(on, np.float32)
        return lambda key, shape, dtype: (
            init(key, shape, dtype) * mask.reshape(-1, *[1] * (len(shape) - 1)).astype(dtype)
        )

    return {
        name: ArraySpec(spec.shape, spec.axes, init=masked(spec.init), dtype=spec.dtype)  # type: ignore[arg-type]
        for name, spec in specs.items()
    }


def adapted_layers(path: str, base: Any, layers: Sequence[int] | None) -> tuple[bool, ...] | None:
    """Which layers of a stacked weight are adapted; None where all are."""
    if layers is None or base.axes[0] != "layers":
        return None
    depth = base.shape[0]
    wrong = [number for number in layers if not 0 <= number < depth]
    if wrong:
        raise LlmtuneConfigError(f"adapt.layers: there is no layer {wrong[0]} in {path}; choose from 0 to {depth - 1}")
    return tuple(number in layers for number in range(depth))


def padded_ranks(own: Mapping[str, Any], choice: LowRank) -> tuple[int, ...] | None:
    """The ranks of the layers of a stack, where some are not adapted; see `LoRA.ranks`."""
    if choice.layers is None or not own["scale"].shape:
        return None
    return tuple(own["a"].shape[-1] if number in choice.layers else 0 for number in range(own["scale"].shape[0]))


def wrap(params: Params, additions: Mapping[str, Any], make: Callable[[str, Any, Any], Any]) -> Params:
    """`make(path, weight, its additions)` in the place of every weight that has some."""

    def change(path: tuple[Any, ...], weight: Any) -> Any:
        name = path_name(path)
        return make(name, weight, additions[name]) if name in additions else weight

    return jax.tree_util.tree_map_with_path(change, params, is_leaf=is_operator)


def _by_rule(declared: Params, pattern: Mapping[str, Any], key: str, both_ends: bool) -> dict[str, tuple[str, Any]]:
    """{path: (the key of the first rule that matches it, its value)}."""
    found: dict[str, tuple[str, Any]] = {}
    for rule, value in pattern.items():
        for path in select(declared, rule, key=f"{key}.{rule}", both_ends=both_ends):
            found.setdefault(path, (f"{key}.{rule}", value))
    return found
