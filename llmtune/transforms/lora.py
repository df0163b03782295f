"""LoRA as a transform: wrap the selected matrices, declare the factors.

    {"q": {"kernel": W}}   -->   {"q": {"kernel": LoRA(W, a, b, scale)}}

The factors' logical axes follow from the base's: a takes its input axis, b its output axis, both its layer axis.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.select import select, weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, LoRA, constant, is_operator, path_name, uniform


@dataclass(frozen=True)
class Factors:
    """The values of one adapter on one weight: a [..., in, rank], b [..., rank, out], scale [...]; see `LoRA`."""

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    ranks: tuple[int, ...] | None = None


def lora(*, rank: int, alpha: float, targets: str | Sequence[str] = "all-linear", rslora: bool = False) -> Transform:
    """A fresh adapter: a as peft draws it (Kaiming-uniform with slope sqrt(5): within 1/sqrt(in)), b zero."""
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank

    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        weights = weights_by_path(declared)
        return {path: _declare(path, weights[path], rank, scale) for path in select(declared, targets)}

    return Transform(init, lambda params, additions: _wrap(params, additions, {}, rslora))


def lora_from(factors: Mapping[str, Factors], *, rslora: bool) -> Transform:
    """An adapter with given values, read from a file: the same structure, initialised to them."""

    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        weights = weights_by_path(declared)
        additions = {}
        for path, given in factors.items():
            if path not in weights:
                raise LlmtuneFormatError(f"adapter: it adapts {path}, which this model does not have")
            specs = _declare(path, weights[path], given.a.shape[-1], 0.0)
            for name, spec in specs.items():
                value = getattr(given, name)
                if value.shape != spec.shape:
                    raise LlmtuneFormatError(
                        f"adapter: {path} has {name} of shape {value.shape} where this model needs {spec.shape}; "
                        "it was made for another base model"
                    )
            additions[path] = {name: ArraySpec(s.shape, s.axes, init=getattr(given, name)) for name, s in specs.items()}
        return additions

    ranks = {path: given.ranks for path, given in factors.items()}
    return Transform(init, lambda params, additions: _wrap(params, additions, ranks, rslora))


def _declare(path: str, base: Any, rank: int, scale: float) -> dict[str, ArraySpec]:
    if "expert" in base.axes:
        raise LlmtuneConfigError(f"adapt.targets: {path} holds experts, which LoRA does not adapt yet; leave them out")
    (*lead, n_in, n_out), (*lead_axes, in_axis, out_axis) = base.shape, base.axes
    if rank < 1 or rank > min(n_in, n_out):
        raise LlmtuneConfigError(
            f"adapt.rank: {rank} does not fit {path}, a matrix of {n_in} x {n_out}; choose 1 to {min(n_in, n_out)}"
        )
    return {
        "a": ArraySpec((*lead, n_in, rank), (*lead_axes, in_axis, "rank"), init=uniform(n_in**-0.5)),
        "b": ArraySpec((*lead, rank, n_out), (*lead_axes, "rank", out_axis)),
        "scale": ArraySpec(tuple(lead), tuple(lead_axes), init=constant(scale)),
    }


def _wrap(params: Params, additions: Mapping[str, Any], ranks: Mapping[str, Any], rslora: bool) -> Params:
    def wrap(path: tuple[Any, ...], weight: Any) -> Any:
        name = path_name(path)
        if name not in additions:
            return weight
        return LoRA(weight, **additions[name], ranks=ranks.get(name), rslora=rslora)

    return jax.tree_util.tree_map_with_path(wrap, params, is_leaf=is_operator)
