"""A bank of LoRA adapters as a transform, and the choice of rows.

    {"q": {"kernel": W}}   --bank_of-->      {"q": {"kernel": Bank(W, a [L, N, in, r], b [L, N, r, out], scale [L, N])}}
                           --choose_rows-->  the same with index int32 [L, batch]

Adapters may be of different ranks and in different places: what one of them lacks is zero. Number N, after the last one, is
the base as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.bottleneck import wrapped
from llmtune.transforms.lora import Factors
from llmtune.transforms.select import EMBEDDING, weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, Bank, is_operator


def bank_of(adapters: Sequence[Mapping[str, Factors]]) -> Transform:
    """All these adapters over one base; none is chosen yet."""
    if not adapters:
        raise LlmtuneConfigError("bank: no adapters are given")

    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        weights = weights_by_path(declared)
        paths = dict.fromkeys(path for own in adapters for path in own)
        return {path: _declare(path, weights.get(path), [own.get(path) for own in adapters]) for path in paths}

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return wrapped(params, {path: lambda base, own=own: Bank(base, **own) for path, own in additions.items()})

    return Transform(init, apply)


def choose_rows(params: Params, index: jax.Array) -> Params:
    """The same weights with adapters chosen for a batch: int32 [batch]. Pure, and nothing is copied but the index."""
    return jax.tree.map(lambda w: w.for_rows(index) if isinstance(w, Bank) else w, params, is_leaf=is_operator)


def _declare(path: str, base: Any, adapters: Sequence[Factors | None]) -> dict[str, ArraySpec]:
    if base is None:
        raise LlmtuneFormatError(f"adapter: it adapts {path}, which this model does not have")
    if path == EMBEDDING or "expert" in base.axes:
        raise LlmtuneConfigError(
            f"bank: an adapter is on {path}; rows choose among those of no embedding and no experts"
        )
    (*lead, n_in, n_out), (*lead_axes, in_axis, out_axis) = base.shape, base.axes
    rank = max(own.a.shape[-1] for own in adapters if own is not None)
    number = len(adapters) + 1
    values = {
        "a": np.zeros((*lead, number, n_in, rank), np.float32),
        "b": np.zeros((*lead, number, rank, n_out), np.float32),
        "scale": np.zeros((*lead, number), np.float32),
    }
    for n, own in enumerate(adapters):
        if own is None:
            continue
        own_rank = own.a.shape[-1]
        if own.a.shape != (*lead, n_in, own_rank) or own.b.shape != (*lead, own_rank, n_out):
            raise LlmtuneFormatError(
                f"adapter: {path} has a of shape {own.a.shape} and b of shape {own.b.shape} where the matrix is "
                f"{n_in} x {n_out}; it was made for another base model"
            )
        values["a"][..., n, :, :own_rank], values["b"][..., n, :own_rank, :] = own.a, own.b
        values["scale"][..., n] = own.scale
    axes = {"a": (None, in_axis, "rank"), "b": (None, "rank", out_axis), "scale": (None,)}
    return {name: ArraySpec(value.shape, (*lead_axes, *axes[name]), init=value) for name, value in values.items()}
