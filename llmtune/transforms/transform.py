"""A transform is a function from weights to weights, written as an (init, apply) pair in the manner of optax.

    additions = transform.init(declared)            # declared params -> the arrays it adds, declared
    params    = transform.apply(params, additions)  # params -> params with operators (or filled slots) in place

`apply` only rearranges leaves, so it maps trees of ArraySpec, of arrays, of shardings and of tracers alike: shapes, layouts,
memory and ahead-of-time lowering of an adapted model all follow from applying the same transform to another kind of tree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Params = dict[str, Any]


class Transform(NamedTuple):
    """See the module's docstring."""

    init: Callable[[Params], Any]
    apply: Callable[[Params, Any], Params]


def chain(*transforms: Transform) -> Transform:
    """The transforms one after the other; the additions are the tuple of theirs."""

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

    return Transform(init, apply)


identity = chain()
