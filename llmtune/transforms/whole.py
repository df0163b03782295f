"""Weights that train in whole beside an adapter (peft's `modules_to_save`), as transforms.

    {"embed": {"table": bfloat16}}  --train_whole-->  {"embed": {"table": float32}}      a master copy that trains
    {"embed": {"table": W}}         --given_whole-->  {"embed": {"table": W'}}           values read from a file

They stay plain arrays, and train: both transforms say so of these paths.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.select import EMBEDDING, HEAD, NAMED_RULES, weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, Quantized, is_operator, path_name

MODULES = {  # names that peft users know, as peft matches them: by the end of a module's name
    "embed_tokens": f"^{EMBEDDING}$",
    "lm_head": f"^{HEAD}$",
    "model.norm": r"^norm/weight$",
    "norm": r"norm/weight$",
    "input_layernorm": r"/attention_norm/weight$",
    "post_attention_layernorm": r"/mlp_norm/weight$",
    "layernorm": r"/(attention|mlp)_norm/weight$",
    **{name: rule for name, rule in NAMED_RULES.items() if name.endswith("_proj")},
}


def select_whole(declared: Params, rules: Sequence[str], *, key: str = "adapt.modules_to_save") -> tuple[str, ...]:
    """The paths of the weights that any rule names, in tree order. A rule that names none is an error.

    A tied head is its embedding: `lm_head` then means the table, which trains once and stays tied (peft's
    `ensure_weight_tying`).
    """
    paths = list(weights_by_path(declared))
    chosen: set[str] = set()
    for rule in rules:
        own = "embed_tokens" if rule == "lm_head" and HEAD not in paths else rule
        try:
            found = [path for path in paths if re.search(MODULES.get(own, own), path)]
        except re.error as error:
            raise LlmtuneConfigError(f"{key}: {rule!r} is not a regular expression ({error})") from None
        if not found or not rule:
            nearest = ", ".join(difflib.get_close_matches(rule, [*MODULES, *paths], n=3, cutoff=0.3) or MODULES)
            raise LlmtuneConfigError(f"{key}: {rule!r} names no weight; nearest: {nearest}")
        chosen.update(found)
    return tuple(path for path in paths if path in chosen)


def train_whole(paths: Sequence[str]) -> Transform:
    """Float32 masters of these weights. One that carries an adapter already is an error."""

    def init(declared: Params) -> dict[str, Any]:
        apply(declared, {})  # refuses before anything is read
        return {}

    def apply(params: Params, additions: Any) -> Params:
        del additions
        return _at(params, dict.fromkeys(paths, _as_master))

    return Transform(init, apply, trains=lambda path, weight: path in paths)


def given_whole(values: Mapping[str, np.ndarray]) -> Transform:
    """Float32 values in place of these weights, whatever was there."""

    def init(declared: Params) -> dict[str, ArraySpec]:
        weights, additions = weights_by_path(declared), {}
        for path, value in values.items():
            spec = _declaration(weights.get(path))
            if spec is None or spec.shape != value.shape:
                raise LlmtuneFormatError(
                    f"adapter: it brings {path} of shape {value.shape} where this model has "
                    f"{'none' if spec is None else spec.shape}; it was made for another base model"
                )
            additions[path] = ArraySpec(spec.shape, spec.axes, init=value)
        return additions

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return _at(params, {path: lambda _, __, new=new: new for path, new in additions.items()})

    return Transform(init, apply, trains=lambda path, weight: path in values)


def _at(params: Params, changes: Mapping[str, Any]) -> Params:
    def change(path: tuple[Any, ...], weight: Any) -> Any:
        name = path_name(path)
        return changes[name](name, weight) if name in changes else weight

    return jax.tree_util.tree_map_with_path(change, params, is_leaf=is_operator)


def _as_master(path: str, weight: Any) -> Any:
    if isinstance(weight, Quantized):
        raise LlmtuneConfigError(
            f"adapt.modules_to_save: {path} is quantised, and codes do not train; leave it out of quantize.targets"
        )
    if is_operator(weight):
        raise LlmtuneConfigError(
            f"adapt.modules_to_save: {path} is among adapt.targets too; a weight trains in whole or by an adapter"
        )
    return replace(weight, dtype="float32") if isinstance(weight, ArraySpec) else weight.astype("float32")


def _declaration(weight: Any) -> ArraySpec | None:
    """The declaration of a weight, or of what an operator stands for."""
    return ArraySpec(weight.shape, weight.axes) if is_operator(weight) else weight
