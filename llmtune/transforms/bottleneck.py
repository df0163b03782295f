"""Bottleneck adapters as transforms: sequential ones around output projections, parallel ones in the slots of the MLPs.

    {"o": {"kernel": W}}         --sequential_adapters-->   {"o": {"kernel": Bottleneck(W, Branch(down, ..., up, ...))}}
    {"mlp": {"adapter": None}}   --parallel_adapters-->     {"mlp": {"adapter": Parallel(Branch(...), scale)}}

`up` begins at zero: a fresh adapter is the identity.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.select import weights_by_path
from llmtune.transforms.slots import empty_slots, fill
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, Bottleneck, Branch, Parallel, constant, is_operator, path_name, uniform

ATTENTION, MLP, EXPERTS, ADAPTER = "attention/o/kernel", "mlp/down/kernel", "mlp/experts/down/kernel", "mlp/adapter"
PLACES = {"houlsby": (ATTENTION, MLP, EXPERTS), "pfeiffer": (MLP, EXPERTS)}  # a block has an MLP or experts
AXES = {"down": ("embed", "rank"), "down_bias": ("rank",), "up": ("rank", "embed"), "up_bias": ("embed",)}
Values = Mapping[str, np.ndarray]  # the fields of a Branch: down [L, hidden, size] (of experts [L, E, ...]), and so on


def sequential_adapters(method: str, *, size: int) -> Transform:
    """Fresh bottlenecks of this width; `method`: houlsby (after attention and after the MLP) or pfeiffer (the MLP alone)."""

    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        _check_size(size)
        weights = weights_by_path(declared)
        return {path: _fresh(own, size) for path, own in weights.items() if path.endswith(PLACES[method])}

    return Transform(init, _wrap)


def sequential_from(branches: Mapping[str, Values]) -> Transform:
    """Bottlenecks with given values, by the path of the projection that they follow."""

    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        weights = weights_by_path(declared)
        return {path: given_branch(path, weights.get(path), values) for path, values in branches.items()}

    return Transform(init, _wrap)


def parallel_adapters(*, size: int, scale: float = 4.0) -> Transform:
    """Fresh branches beside every MLP, their sum scaled (4 is what He et al. use)."""

    def declare(path: str, layers: int, hidden: int) -> dict[str, Any]:
        _check_size(size)
        return {
            "branch": _fresh(_square(layers, hidden), size),
            "scale": ArraySpec((layers,), ("layers",), init=constant(scale)),
        }

    return _parallel(declare)


def parallel_from(branches: Mapping[str, Values], scales: Mapping[str, np.ndarray]) -> Transform:
    """Branches with given values, by the path of their slot, and the scale float32 [L] of each."""

    def declare(path: str, layers: int, hidden: int) -> dict[str, Any]:
        if path not in branches:
            raise LlmtuneFormatError(f"adapter: it brings nothing for {path}; it was made for another base model")
        branch = given_branch(path, _square(layers, hidden), branches[path])
        return {"branch": branch, "scale": ArraySpec((layers,), ("layers",), init=scales[path])}

    return _parallel(declare)


def _parallel(declare: Callable[[str, int, int], dict[str, Any]]) -> Transform:
    def init(declared: Params) -> dict[str, dict[str, Any]]:
        weights = weights_by_path(declared)
        hidden = weights["embed/table"].shape[-1]
        depth = {
            path.split("/mlp_norm")[0]: w.shape[0] for path, w in weights.items() if path.endswith("/mlp_norm/weight")
        }
        paths = empty_slots(declared, ADAPTER, "parallel_adapter")
        return {path: declare(path, depth[path.removesuffix(f"/{ADAPTER}")], hidden) for path in paths}

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return fill(params, {path: Parallel(Branch(**own["branch"]), own["scale"]) for path, own in additions.items()})

    return Transform(init, apply)


def given_branch(path: str, base: Any, values: Values) -> dict[str, ArraySpec]:
    """The declaration of a branch after `base` with these values, its shapes checked. Raises LlmtuneFormatError."""
    if base is None:
        raise LlmtuneFormatError(f"adapter: it adapts {path}, which this model does not have")
    fresh = _fresh(base, values["down"].shape[-1])
    for name, spec in fresh.items():
        if values[name].shape != spec.shape:
            raise LlmtuneFormatError(
                f"adapter: {path} has {name} of shape {values[name].shape} where this model needs {spec.shape}; "
                "it was made for another base model"
            )
    return {name: ArraySpec(spec.shape, spec.axes, init=values[name]) for name, spec in fresh.items()}


def _square(layers: int, hidden: int) -> ArraySpec:
    """What a branch beside a block would follow: its result is as wide as its input."""
    return ArraySpec((layers, hidden, hidden), ("layers", "embed", "embed"))


def _fresh(base: Any, size: int) -> dict[str, ArraySpec]:
    """Of what follows `base` [..., in, hidden], with its leading axes."""
    (*lead, _, hidden), lead_axes = base.shape, base.axes[:-2]
    shapes = {"down": (hidden, size), "down_bias": (size,), "up": (size, hidden), "up_bias": (hidden,)}
    starts = {"down": uniform(hidden**-0.5)}
    return {
        name: ArraySpec((*lead, *shape), (*lead_axes, *AXES[name]), init=starts.get(name, constant(0.0)))
        for name, shape in shapes.items()
    }


def _wrap(params: Params, additions: Mapping[str, Any]) -> Params:
    return wrapped(
        params, {path: lambda base, own=own: Bottleneck(base, Branch(**own)) for path, own in additions.items()}
    )


def wrapped(params: Params, wraps: Mapping[str, Callable[[Any], Any]]) -> Params:
    """The tree with `wraps[path](weight)` in the place of each weight that has one."""

    def wrap(path: tuple[Any, ...], weight: Any) -> Any:
        name = path_name(path)
        return wraps[name](weight) if name in wraps else weight

    return jax.tree_util.tree_map_with_path(wrap, params, is_leaf=is_operator)


def _check_size(size: int) -> None:
    if size < 1:
        raise LlmtuneConfigError(f"adapt.size: a bottleneck needs a width of 1 or more, got {size}")
