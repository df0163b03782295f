"""A transform is a function from weights to weights, written as an (init, apply) pair in the manner of optax.

    additions = transform.init(declared)            # declared params -> the arrays it adds, declared
    params    = transform.apply(params, additions)  # params -> params with operators (or filled slots) in place

`apply` only rearranges leaves, so it maps trees of ArraySpec, of arrays, of shardings and of tracers alike: shapes, layouts,
memory and ahead-of-time lowering of an adapted model all follow from applying the same transform to another kind of tree.

Two more functions have defaults that nearly every transform keeps. `build(params, additions)` is `apply` on arrays where some
values follow from the weights themselves (PiSSA's factors, DoRA's magnitudes); it gives the structure that `apply` gives.
`trains(path, weight)` says which weights of the result train: operators, their trainable fields.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llmtune.transforms.partition import Trains, adapters, everything

Params = dict[str, Any]


class Transform(NamedTuple):
    """See the module's docstring. `build`: None where it is `apply`."""

    init: Callable[[Params], Any]
    apply: Callable[[Params, Any], Params]
    build: Callable[[Params, Any], Params] | None = None
    trains: Trains = adapters


def build(transform: Transform, params: Params, additions: Any) -> Params:
    """Arrays in, arrays out: what a model is made with. To be called under the mesh and its active strategy."""
    return (transform.build or transform.apply)(params, additions)


def chain(*transforms: Transform) -> Transform:
    """The transforms one after the other; the additions are the tuple of theirs. What any of them trains, trains."""

    def init(declared: Params) -> tuple[Any, ...]:
        additions = []
        for transform in transforms:
            additions.append(transform.init(declared))
            declared = transform.apply(declared, additions[-1])
        return tuple(additions)

    def apply(params: Params, additions: tuple[Any, ...]) -> Params:
        for transform, own in zip(transforms, additions, strict=True):
            params = transform.apply(params, own)
        return params

    def build_all(params: Params, additions: tuple[Any, ...]) -> Params:
        for transform, own in zip(transforms, additions, strict=True):
            params = build(transform, params, own)
        return params

    def trains(path: str, weight: Any) -> bool:
        return any(transform.trains(path, weight) for transform in transforms)

    return Transform(init, apply, build_all, trains)


identity = chain()
full = Transform(lambda declared: (), lambda params, additions: params, trains=everything)
