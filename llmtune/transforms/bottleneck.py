"""Bottleneck adapters as transforms: sequential ones around output projections, parallel ones in the slots of the MLPs.

    {"o": {"kernel": W}}     --sequential_adapters-->   {"o": {"kernel": Bottleneck(W, Branch(down, ..., up, ...))}}
    {"mlp": {"adapter": None}}   --parallel_adapters-->     {"mlp": {"adapter": Parallel(Branch(...), scale)}}

`up` begins at zero: a fresh adapter is the identity.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.select import weights_by_path
from llmtune.transforms.slots import empty_slots, fill
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, Bottleneck, Branch, Fusion, Initializer, Parallel, constant, is_operator
from llmtune.weights import normal, path_name, uniform

ATTENTION, MLP, ADAPTER = "attention/o/kernel", "mlp/down/kernel", "mlp/adapter"
PLACES = {"houlsby": (ATTENTION, MLP), "pfeiffer": (MLP,)}  # where each paper puts them in a block
FIELDS = ("down", "down_bias", "up", "up_bias")
Branches = Mapping[str, Mapping[str, np.ndarray]]  # path -> the fields of a Branch, stacked over layers


def sequential_adapters(method: str, *, size: int) -> Transform:
    """Fresh bottlenecks of this width; `method`: houlsby (after attention and after the MLP) or pfeiffer (the MLP alone)."""

    def init(declared: Params) -> dict[str, Any]:
        weights = weights_by_path(declared)
        return {path: _fresh(weights[path].shape, size) for path in _projections(declared, method)}

    return Transform(init, _wrap)


def sequential_from(branches: Branches) -> Transform:
    """Bottlenecks with given values, read from a file."""

    def init(declared: Params) -> dict[str, Any]:
        weights = weights_by_path(declared)
        return {path: _checked(path, weights, values) for path, values in branches.items()}

    return Transform(init, _wrap)


def parallel_adapters(*, size: int, scale: float = 4.0) -> Transform:
    """Fresh branches beside every MLP, scaled (He et al. 2022 find 4 best)."""

    def declare(path: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"branch": _fresh(shape, size), "scale": ArraySpec(shape[:1], ("layers",), init=constant(scale))}

    return _parallel(declare)


def parallel_from(branches: Branches, scale: Mapping[str, np.ndarray]) -> Transform:
    """Branches with given values, by the path of their slot, and the scale [L] of each."""

    def declare(path: str, shape: tuple[int, ...]) -> dict[str, Any]:
        if path not in branches:
            raise LlmtuneFormatError(f"adapter: it brings nothing for {path}; it was made for another base model")
        return {
            "branch": _given(path, shape, branches[path]),
            "scale": ArraySpec(shape[:1], ("layers",), init=scale[path]),
        }

    return _parallel(declare)


def fusion_from(adapters: Sequence[Branches]) -> Transform:
    """Learned attention over these trained adapters, which stay as they are. They must stand in the same places."""
    if len(adapters) < 2:
        raise LlmtuneConfigError(f"adapt.adapters: fusion needs two adapters or more, got {len(adapters)}")
    for n, other in enumerate(adapters):
        if set(other) != set(adapters[0]):
            odd = sorted(set(other) ^ set(adapters[0]))[0]
            raise LlmtuneConfigError(f"adapt.adapters: adapters 0 and {n} stand in different places ({odd})")

    def init(declared: Params) -> dict[str, Any]:
        weights, additions = weights_by_path(declared), {}
        for path in adapters[0]:
            each = [_checked(path, weights, own[path]) for own in adapters]
            additions[path] = {"branches": _stacked([{name: own[name].init for name in FIELDS} for own in each])}
            layers, _, out = weights[path].shape
            starts = {"query": normal(0.02), "key": normal(0.02), "value": identity_matrix}
            for name, start in starts.items():
                additions[path][name] = ArraySpec((layers, out, out), ("layers", "embed", None), init=start)
        return additions

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return _at(params, additions, lambda base, own: Fusion(base, Branch(**own["branches"]), *_heads(own)))

    return Transform(init, apply)


def fusion_with(branches: Branches, heads: Mapping[str, Mapping[str, np.ndarray]]) -> Transform:
    """A trained fusion read from a file: branches stacked [L, adapters, ...], and query, key, value [L, out, out] by path."""

    def init(declared: Params) -> dict[str, Any]:
        weights, additions = weights_by_path(declared), {}
        for path, own in branches.items():
            _checked(path, weights, {name: value[:, 0] for name, value in own.items()})
            specs = {name: ArraySpec(v.shape, ("layers", "embed", None), init=v) for name, v in heads[path].items()}
            additions[path] = {"branches": _specs(own, lead=("layers", None)), **specs}
        return additions

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return _at(params, additions, lambda base, own: Fusion(base, Branch(**own["branches"]), *_heads(own)))

    return Transform(init, apply)
