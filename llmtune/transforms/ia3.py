"""IA3 as a transform: keys and values stretched as they come out, the hidden MLP layer as it goes into `down`.

{"k": {"kernel": W}}      -->  {"k": {"kernel": IA3(W, gain [out], on, side="out")}}
{"down": {"kernel": W}}   -->  {"down": {"kernel": IA3(W, gain [in], on, side="in")}}

Experts, where they are targets, have vectors of their own each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.low_rank import wrap
from llmtune.transforms.select import EMBEDDING, select, weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import IA3, ArraySpec, constant

Side = Literal["in", "out"]
DOWN = ("mlp/down/kernel", "mlp/experts/down/kernel")


@dataclass(frozen=True)
class Gains:
    """The values of one weight: gain [..., in] or [..., out] by `side`, on [...] 1 or 0."""

    gain: np.ndarray
    on: np.ndarray
    side: Side


def ia3(
    *,
    targets: str | Sequence[str] = ("k_proj", "v_proj", "down_proj"),
    feedforward: str | Sequence[str] | None = None,
) -> Transform:
    """Fresh gains of one. `feedforward`: those of the targets whose input is stretched; None: the MLP's down, experts' too."""

    def sides(params: Params) -> dict[str, Side]:
        chosen = select(params, targets)
        if feedforward is None:
            return {path: "in" if path.endswith(DOWN) else "out" for path in chosen}
        inward = select(params, feedforward, key="adapt.feedforward") if feedforward else []
        lone = [path for path in inward if path not in chosen]
        if lone:
            raise LlmtuneConfigError(
                f"adapt.feedforward: {lone[0]} is not among adapt.targets; add it there, or leave it out here"
            )
        return {path: "in" if path in inward else "out" for path in chosen}

    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        weights = weights_by_path(declared)
        return {path: _declare(path, weights, side) for path, side in sides(declared).items()}

    return Transform(init, lambda params, additions: _wrap(params, additions, sides(params)))


def ia3_from(gains: Mapping[str, Gains]) -> Transform:
    """Given gains, read from a file."""

    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        weights, additions = weights_by_path(declared), {}
        for path, given in gains.items():
            specs = _declare(path, weights, given.side)
            if given.gain.shape != specs["gain"].shape:
                raise LlmtuneFormatError(
                    f"adapter: {path} has a gain of shape {given.gain.shape} where this model needs {specs['gain'].shape}; "
                    "it was made for another base model"
                )
            additions[path] = {name: ArraySpec(s.shape, s.axes, init=getattr(given, name)) for name, s in specs.items()}
        return additions

    sides: dict[str, Side] = {path: given.side for path, given in gains.items()}
    return Transform(init, lambda params, additions: _wrap(params, additions, sides))


def _declare(path: str, weights: Mapping[str, Any], side: Side) -> dict[str, ArraySpec]:
    base = weights[path]
    if path == EMBEDDING:
        raise LlmtuneConfigError(f"adapt.targets: IA3 adapts no embedding; leave {path} out, or use lora")
    if side == "out" and path.replace("/kernel", "/bias") in weights:
        raise LlmtuneConfigError(
            f"adapt.targets: {path} has a bias, which IA3 would have to stretch with it; that is not there, use lora"
        )
    lead, axes, at = base.shape[:-2], base.axes[:-2], -2 if side == "in" else -1
    return {
        "gain": ArraySpec((*lead, base.shape[at]), (*axes, base.axes[at]), init=constant(1.0)),
        "on": ArraySpec(tuple(lead), tuple(axes), init=constant(1.0)),
    }


def _wrap(params: Params, additions: Mapping[str, Any], sides: Mapping[str, Side]) -> Params:
    return wrap(params, additions, lambda path, base, own: IA3(base, own["gain"], own["on"], sides[path]))
