"""AdapterFusion as a transform: learned attention over several trained bottleneck adapters, which stay as they are.

    {"down": {"kernel": W}}   --fusion_of-->   {"down": {"kernel": Fusion(W, Branch of all, query, key, value)}}

`value` begins as the identity, query and key small: at first the adapters count alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.bottleneck import AXES, Values, given_branch, wrapped
from llmtune.transforms.select import weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, Branch, Fusion, normal

HEADS = ("query", "key", "value")


def fusion_of(adapters: Sequence[Mapping[str, Values]]) -> Transform:
    """A fresh fusion of these adapters, each by the path of the projection that it follows. All must stand in the same places.

    Narrower bottlenecks are padded with zeros, which changes nothing.
    """
    if len(adapters) < 2:
        raise LlmtuneConfigError(f"adapt.adapters: fusion is of two adapters or more, {len(adapters)} given")
    for number, other in enumerate(adapters):
        odd = sorted(set(other) ^ set(adapters[0]))
        if odd:
            raise LlmtuneConfigError(
                f"adapt.adapters: the first one and number {number + 1} stand in different places ({odd[0]}); "
                "fuse adapters of one method"
            )

    def init(declared: Params) -> dict[str, dict[str, Any]]:
        weights, additions = weights_by_path(declared), {}
        for path in adapters[0]:
            _refuse_experts(path, weights.get(path))
            each = [own[path] for own in adapters]
            for values in each:
                given_branch(path, weights.get(path), values)  # refuses those of another base
            layers, _, out = weights[path].shape
            starts = dict(zip(HEADS, (normal(0.02), normal(0.02), _identity), strict=True))
            heads = {
                n: ArraySpec((layers, out, out), ("layers", "embed", None), init=start) for n, start in starts.items()
            }
            additions[path] = {"branches": _branches(_stacked(each)), **heads}
        return additions

    return Transform(init, _wrap)


def fusion_from(values: Mapping[str, Mapping[str, np.ndarray]]) -> Transform:
    """A trained fusion: by path, the fields of its branches [L, adapters, ...], and query, key and value [L, out, out]."""

    def init(declared: Params) -> dict[str, dict[str, Any]]:
        weights, additions = weights_by_path(declared), {}
        for path, own in values.items():
            _refuse_experts(path, weights.get(path))
            first = {name: own[name][:, 0] for name in AXES}
            given_branch(path, weights.get(path), first)
            layers, _, out = weights[path].shape
            for name in HEADS:
                if own[name].shape != (layers, out, out):
                    raise LlmtuneFormatError(
                        f"adapter: {path} has {name} of shape {own[name].shape}, not {(layers, out, out)}"
                    )
            heads = {n: ArraySpec(own[n].shape, ("layers", "embed", None), init=own[n]) for n in HEADS}
            additions[path] = {"branches": _branches({name: own[name] for name in AXES}), **heads}
        return additions

    return Transform(init, _wrap)


def _refuse_experts(path: str, base: Any) -> None:
    """Attention over adapters of every expert would be three matrices [hidden, hidden] for each: larger than the model."""
    if base is not None and "expert" in base.axes:
        raise LlmtuneConfigError(
            f"adapt.adapters: they stand after {path}, which is of experts, and fusion would need an attention for each of them; "
            "fuse adapters of a model without experts"
        )


def _stacked(each: Sequence[Values]) -> dict[str, np.ndarray]:
    """The fields of several branches [L, ...] -> [L, adapters, ...], padded to the widest."""
    widest = max(values["down"].shape[-1] for values in each)

    def padded(name: str, value: np.ndarray) -> np.ndarray:
        axes = ("layers", *AXES[name])
        missing = [(0, widest - size if axis == "rank" else 0) for axis, size in zip(axes, value.shape, strict=True)]
        return np.pad(value, missing)

    return {name: np.stack([padded(name, values[name]) for values in each], axis=1) for name in AXES}


def _branches(values: Values) -> dict[str, ArraySpec]:
    return {n: ArraySpec(value.shape, ("layers", None, *AXES[n]), init=value) for n, value in values.items()}


def _wrap(params: Params, additions: Mapping[str, Any]) -> Params:
    def fuse(own: Mapping[str, Any], base: Any) -> Fusion:
        return Fusion(base, Branch(**own["branches"]), **{name: own[name] for name in HEADS})

    return wrapped(params, {path: lambda base, own=own: fuse(own, base) for path, own in additions.items()})


def _identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
