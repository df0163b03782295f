"""LoRA and DoRA as transforms: wrap the selected matrices, declare the factors.

    {"q": {"kernel": W}}   --lora-->   {"q": {"kernel": LoRA(W, a, b, scale)}}
                           --dora-->   {"q": {"kernel": DoRA(LoRA(W, a, b, scale), magnitude, square)}}

With an initialiser (`llmtune.transforms.initial`) a and b begin with a part of W, which is taken out of the base in return:

                           --lora, initial=pissa-->  LoRA(LoRA(W, a0, b0, -scale), a, b, scale)        a = a0, b = b0

The base stays as it was stored, so that it may be quantised, and what is exported is a plain LoRA of twice the rank.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.initial import Initial, start
from llmtune.transforms.loftq import Stored, approach, require_codes
from llmtune.transforms.low_rank import LowRank, Plan, declare_factors, only_layers, padded_ranks, plan, wrap
from llmtune.transforms.select import EMBEDDING, weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, DoRA, LoRA, measured

Specs = dict[str, ArraySpec]


@dataclass(frozen=True)
class Toward:
    """LoftQ: the matrices as they are stored, and how often codes and factors are found in turn."""

    stored: Stored
    iterations: int = 1


@dataclass(frozen=True)
class Factors:
    """The values of one adapter on one weight: a [..., in, rank], b [..., rank, out], scale [...]; see `LoRA`.

    `magnitude` [..., out]: of DoRA, else None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    ranks: tuple[int, ...] | None = None
    magnitude: np.ndarray | None = None


def lora(
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = "all-linear",
    initial: Initial | None = None,
    toward: Toward | None = None,
    **more: Any,
) -> Transform:
    """A fresh adapter; `more`: the other fields of `LowRank`.

    The model begins as it was, b being zero, or what `initial` finds being taken out of the base. With `toward` it begins
    nearer to those matrices than its quantised base is (LoftQ).
    """
    return _fresh(LowRank(rank, alpha, targets, **more), initial, toward, _low_rank_additions)


def dora(
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = "all-linear",
    initial: Initial | None = None,
    toward: Toward | None = None,
    **more: Any,
) -> Transform:
    """A fresh adapter of which the columns' lengths are trained apart from their directions; all else as in `lora`."""
    return _fresh(LowRank(rank, alpha, targets, **more), initial, toward, _dora_additions)


def lora_from(factors: Mapping[str, Factors], *, rslora: bool, dropout: float = 0.0) -> Transform:
    """An adapter with given values, read from a file: the same structure, initialised to them."""

    def init(declared: Params) -> dict[str, Specs]:
        weights = weights_by_path(declared)
        missing = [path for path in factors if path not in weights]
        if missing:
            raise LlmtuneFormatError(f"adapter: it adapts {missing[0]}, which this model does not have")
        return {path: _given(path, weights[path], given) for path, given in factors.items()}

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        ranks = {path: given.ranks for path, given in factors.items()}
        return wrap(params, additions, lambda path, base, own: _operator(base, own, ranks[path], rslora, dropout))

    def build(params: Params, additions: Mapping[str, Any]) -> Params:
        return _measure(apply(params, additions), additions, magnitude=False)

    return Transform(init, apply, build)


def _fresh(
    choice: LowRank, initial: Initial | None, toward: Toward | None, declare: Callable[[str, Any, Plan], Specs]
) -> Transform:
    def init(declared: Params) -> dict[str, Specs]:
        weights, plans = weights_by_path(declared), plan(declared, choice)
        if toward is not None:
            require_codes({path: weights[path] for path in plans})
        return {path: declare(path, weights[path], own) for path, own in plans.items()}

    def make(path: str, base: Any, own: dict[str, Any], taken_out: Any = lambda own: own) -> Any:
        del path
        if initial is not None:
            base = LoRA(base, **{name: taken_out(own)[name] for name in ("a", "b", "scale")}, taken=True)
        return _operator(base, own, padded_ranks(own, choice), choice.rslora, choice.dropout)

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return wrap(params, additions, make)

    def build(params: Params, additions: Mapping[str, Any]) -> Params:
        begun = additions if initial is None else start(params, additions, initial)
        if toward is not None:
            params, begun = approach(params, begun, toward.stored, toward.iterations)
        params = wrap(params, begun, functools.partial(make, taken_out=_taken_out))
        return _measure(params, begun, magnitude=True)

    return Transform(init, apply, build)


def _taken_out(own: Mapping[str, Any]) -> dict[str, Any]:
    """The frozen opposite of a beginning. Its arrays are its own: those that train are donated to each step."""
    return {"a": jnp.copy(own["a"]), "b": jnp.copy(own["b"]), "scale": -own["scale"]}


def _low_rank_additions(path: str, base: Any, own: Plan) -> Specs:
    specs = declare_factors(path, base, own.rank, own.scale, noise=own.noise, key=own.key)
    return specs if own.adapted is None else only_layers(specs, own.adapted)


def _dora_additions(path: str, base: Any, own: Plan) -> Specs:
    if path == EMBEDDING:
        raise LlmtuneConfigError(f"adapt.targets: DoRA adapts no embedding; leave {path} out, or use lora")
    return {**_low_rank_additions(path, base, own), **_lengths(base)}


def _lengths(base: Any) -> Specs:
    columns = ArraySpec((*base.shape[:-2], base.shape[-1]), (*base.axes[:-2], base.axes[-1]))
    return {"magnitude": columns, "square": columns}


def _given(path: str, base: Any, given: Factors) -> Specs:
    specs = declare_factors(path, base, given.a.shape[-1], 0.0)
    if given.magnitude is not None:
        specs["magnitude"] = _lengths(base)["magnitude"]
    values = {name: getattr(given, name) for name in specs}
    for name, spec in specs.items():
        if values[name].shape != spec.shape:
            raise LlmtuneFormatError(
                f"adapter: {path} has {name} of shape {values[name].shape} where this model needs {spec.shape}; "
                "it was made for another base model"
            )
    given_specs = {name: ArraySpec(spec.shape, spec.axes, init=values[name]) for name, spec in specs.items()}
    return given_specs if given.magnitude is None else {**_lengths(base), **given_specs}


def _operator(base: Any, own: Specs, ranks: tuple[int, ...] | None, rslora: bool, dropout: float) -> Any:
    low = LoRA(base, own["a"], own["b"], own["scale"], ranks=ranks, rslora=rslora, dropout=dropout)  # type: ignore[arg-type]
    return DoRA(low, own["magnitude"], own["square"]) if "magnitude" in own else low  # type: ignore[arg-type]


def _measure(params: Params, additions: Mapping[str, Any], *, magnitude: bool) -> Params:
    """DoRA's lengths from the weights; `magnitude`: those that train, too."""
    weights = weights_by_path(params)
    found = measured(
        {path: weight for path in additions if isinstance(weight := weights[path], DoRA)}, magnitude=magnitude
    )
    return wrap(params, found, lambda path, weight, own: own)
