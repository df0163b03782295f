"""VeRA as a transform: two random matrices for the whole model, two vectors for each adapted one.

    {"q": {"kernel": W}, "down": {"kernel": W'}}
      -->  {"q": {"kernel": VeRA(W, a, b, inner, outer)}, "down": {"kernel": VeRA(W', a, b, inner', outer')}}

`a` and `b` are the same arrays everywhere; they are held once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.low_rank import wrap
from llmtune.transforms.select import EMBEDDING, select, weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, VeRA, constant, uniform


@dataclass(frozen=True)
class Projections:
    """The shared matrices: a [in, rank], b [rank, out], as large as the largest adapted weight."""

    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True)
class Vectors:
    """The values of one weight: inner [..., rank], outer [..., out]."""

    inner: np.ndarray
    outer: np.ndarray


def vera(
    *, rank: int, targets: str | Sequence[str] = "all-linear", d_initial: float = 0.1, dropout: float = 0.0
) -> Transform:
    """Fresh vectors, as peft begins: inner `d_initial`, outer zero; the projections Kaiming-uniform."""

    def init(declared: Params) -> dict[str, Any]:
        weights, paths = weights_by_path(declared), select(declared, targets)
        for path in paths:
            if path == EMBEDDING:
                raise LlmtuneConfigError(f"adapt.targets: VeRA adapts no embedding; leave {path} out")
        n_in, n_out = (max(weights[path].shape[axis] for path in paths) for axis in (-2, -1))
        if not rank >= 1:
            raise LlmtuneConfigError(f"adapt.rank: {rank} must be positive")
        shared = {
            "a": ArraySpec((n_in, rank), (None, None), init=uniform(math.sqrt(6 / n_in))),
            "b": ArraySpec((rank, n_out), (None, None), init=uniform(math.sqrt(6 / rank))),
        }
        return {"shared": shared, "own": {path: _declare(weights[path], rank, d_initial) for path in paths}}

    return Transform(init, lambda params, additions: _wrap(params, additions, dropout))


def vera_from(projections: Projections, vectors: Mapping[str, Vectors], *, dropout: float = 0.0) -> Transform:
    """Given values, read from a file."""
    rank = projections.a.shape[-1]

    def init(declared: Params) -> dict[str, Any]:
        weights, own = weights_by_path(declared), {}
        for path, given in vectors.items():
            specs = _declare(weights[path], rank, 0.0)
            for name, spec in specs.items():
                if getattr(given, name).shape != spec.shape:
                    raise LlmtuneFormatError(
                        f"adapter: {path} has {name} of shape {getattr(given, name).shape} where this model needs "
                        f"{spec.shape}; it was made for another base model"
                    )
            own[path] = {name: ArraySpec(s.shape, s.axes, init=getattr(given, name)) for name, s in specs.items()}
        shared = {
            name: ArraySpec(value.shape, (None, None), init=value)
            for name, value in (("a", projections.a), ("b", projections.b))
        }
        return {"shared": shared, "own": own}

    return Transform(init, lambda params, additions: _wrap(params, additions, dropout))


def _declare(base: Any, rank: int, d_initial: float) -> dict[str, ArraySpec]:
    (*lead, _, n_out), (*axes, _, out_axis) = base.shape, base.axes
    return {
        "inner": ArraySpec((*lead, rank), (*axes, "rank"), init=constant(d_initial)),
        "outer": ArraySpec((*lead, n_out), (*axes, out_axis)),
    }


def _wrap(params: Params, additions: Mapping[str, Any], dropout: float) -> Params:
    a, b = additions["shared"]["a"], additions["shared"]["b"]
    return wrap(
        params,
        additions["own"],
        lambda path, base, own: VeRA(base, a, b, own["inner"], own["outer"], dropout=dropout),
    )
