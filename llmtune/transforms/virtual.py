"""Prompt tuning, P-tuning and prefix tuning as transforms: they fill slots with virtual tokens (`llmtune.weights.virtual`).

    {"prompt": None}                         --prompt_tuning-->   {"prompt": Prompt([n, hidden])}
    {"prompt": None}                         --p_tuning-->        {"prompt": EncodedPrompt([n, hidden], w1, b1, ...)}
    {"layers": [{"attention": {"prefix": None}}]}  --prefix_tuning-->  Prefix(k [L, n, kv_heads * head_dim], v [...])

Learned vectors begin as small as embeddings do. Nothing here is the identity at first: even a prompt of zeros is looked at.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.transforms.select import weights_by_path
from llmtune.transforms.slots import empty_slots, fill, refuse_other_virtual_tokens
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, EncodedPrompt, Prefix, Prompt, normal, uniform

PROMPT, PREFIX = "prompt", "attention/prefix"
SPREAD = normal(0.02)


def prompt_tuning(*, virtual_tokens: int) -> Transform:
    """A fresh prompt of so many vectors."""
    return _prompt("prompt_tuning", virtual_tokens, lambda hidden: {"table": _table(virtual_tokens, hidden)}, Prompt)


def p_tuning(*, virtual_tokens: int, encoder_hidden: int | None = None) -> Transform:
    """A fresh prompt that a network of two hidden layers makes; `encoder_hidden`: their width (default: the model's)."""

    def declare(hidden: int) -> dict[str, ArraySpec]:
        inner = encoder_hidden or hidden
        widths = (("embed", hidden), (None, inner), (None, inner), ("embed", hidden))
        specs = {"table": ArraySpec((virtual_tokens, hidden), (None, "embed"), init=normal(1.0))}
        for n in range(1, 4):
            (in_axis, n_in), (out_axis, n_out) = widths[n - 1], widths[n]
            specs[f"w{n}"] = ArraySpec((n_in, n_out), (in_axis, out_axis), init=uniform(n_in**-0.5))
            specs[f"b{n}"] = ArraySpec((n_out,), (out_axis,), init=uniform(n_in**-0.5))
        return specs

    return _prompt("p_tuning", virtual_tokens, declare, EncodedPrompt)


def prompt_from(table: np.ndarray) -> Transform:
    """A prompt with given vectors [n, hidden], read from a file."""

    def declare(hidden: int) -> dict[str, ArraySpec]:
        return {"table": _given("prompt", table, (len(table), hidden), (None, "embed"))}

    return _prompt("prompt_tuning", len(table), declare, Prompt)


def prefix_tuning(*, virtual_tokens: int) -> Transform:
    """Fresh keys and values for every layer."""
    return _prefix(lambda name, shape, axes: ArraySpec(shape, axes, init=SPREAD), virtual_tokens)


def prefix_from(values: Mapping[str, np.ndarray]) -> Transform:
    """Given keys and values: `{"k": [L, n, kv_heads * head_dim], "v": ...}`, read from a file, for a model of one stack."""
    return _prefix(lambda name, shape, axes: _given(name, values[name], shape, axes), values["k"].shape[-2])


def _prompt(method: str, number: int, declare: Callable[[int], dict[str, ArraySpec]], kind: type) -> Transform:
    def init(declared: Params) -> dict[str, ArraySpec]:
        _check(method, number)
        refuse_other_virtual_tokens(declared, method)
        return declare(weights_by_path(declared)["embed/table"].shape[-1])

    return Transform(init, lambda params, additions: fill(params, {PROMPT: kind(**additions)}))


def _prefix(declare: Callable[[str, tuple[int, ...], tuple[str | None, ...]], ArraySpec], number: int) -> Transform:
    def init(declared: Params) -> dict[str, dict[str, ArraySpec]]:
        _check("prefix_tuning", number)
        refuse_other_virtual_tokens(declared, "prefix_tuning")
        weights, additions = weights_by_path(declared), {}
        for path in empty_slots(declared, PREFIX, "prefix_tuning"):
            layers, _, width = weights[path.removesuffix("prefix") + "k/kernel"].shape
            axes = ("layers", None, "kv_heads")
            additions[path] = {name: declare(name, (layers, number, width), axes) for name in ("k", "v")}
        return additions

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return fill(params, {path: Prefix(**own) for path, own in additions.items()})

    return Transform(init, apply)


def _table(number: int, hidden: int) -> ArraySpec:
    return ArraySpec((number, hidden), (None, "embed"), init=SPREAD)


def _given(name: str, value: np.ndarray, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> ArraySpec:
    if value.shape != shape:
        raise LlmtuneFormatError(
            f"adapter: its {name} has the shape {value.shape} where this model needs {shape}; it was made for another base model"
        )
    return ArraySpec(shape, axes, init=value)


def _check(method: str, number: int) -> None:
    if number < 1:
        raise LlmtuneConfigError(f"adapt.virtual_tokens: {method} needs 1 or more, got {number}")
