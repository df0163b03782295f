"""Prompt tuning, P-tuning and prefix tuning as transforms: they fill slots with virtual tokens (`llmtune.weights.virtual`).

    {"prompt": None}                         --prompt_tuning-->   {"prompt": Prompt([n, hidden])}
    {"prompt": None}                         --p_tuning-->        {"prompt": EncodedPrompt([n, hidden], w1, b1, ...)}
    {"prompt": None}                         --p_tuning, encoder="lstm"-->  RecurrentPrompt([n, hidden], ...)
    {"layers": [{"attention": {"prefix": None}}]}  --prefix_tuning-->  Prefix(k [L, n, kv_heads * head_dim], v [...])

Learned vectors begin as small as embeddings do, or as the embeddings of a text. Nothing here is the identity at first: even a
prompt of zeros is looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.sharding import placed_by_compiler
from llmtune.transforms.select import weights_by_path
from llmtune.transforms.slots import empty_slots, fill, refuse_other_virtual_tokens
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import ArraySpec, EncodedPrompt, Prefix, Prompt, Recurrence, RecurrentPrompt, normal, uniform

PROMPT, PREFIX = "prompt", "attention/prefix"
TABLE_AXES = (None, "embed")  # of what stands in the place of embeddings
SPREAD = normal(0.02)


def prompt_tuning(*, virtual_tokens: int, text: Sequence[int] = ()) -> Transform:
    """A fresh prompt of so many vectors; `text`: it begins as the embeddings of these ids, cut or repeated to its length."""
    noise = _prompt("prompt_tuning", virtual_tokens, lambda hidden: {"table": _table(virtual_tokens, hidden)}, Prompt)
    if not text:
        return noise
    ids = np.resize(np.asarray(text, np.int32), virtual_tokens)

    def build(params: Params, additions: Mapping[str, Any]) -> Params:
        rows = placed_by_compiler(lambda table, ids: table[ids].astype(np.float32), *TABLE_AXES)
        return noise.apply(params, {"table": jax.jit(rows)(weights_by_path(params)["embed/table"], ids)})

    return Transform(noise.init, noise.apply, build)


def p_tuning(
    *, virtual_tokens: int, encoder: Literal["mlp", "lstm"] = "mlp", encoder_hidden: int | None = None
) -> Transform:
    """A fresh prompt that a small network makes; `encoder_hidden`: its width (default: the model's)."""
    declare, kind = ENCODERS[encoder]
    return _prompt(
        "p_tuning", virtual_tokens, lambda hidden: declare(virtual_tokens, hidden, encoder_hidden or hidden), kind
    )


def _declare_mlp(virtual_tokens: int, hidden: int, inner: int) -> dict[str, ArraySpec]:
    """Two hidden layers."""
    widths = (("embed", hidden), (None, inner), (None, inner), ("embed", hidden))
    specs = {"table": ArraySpec((virtual_tokens, hidden), TABLE_AXES, init=normal(1.0))}
    for n in range(1, 4):
        (in_axis, n_in), (out_axis, n_out) = widths[n - 1], widths[n]
        specs[f"w{n}"] = ArraySpec((n_in, n_out), (in_axis, out_axis), init=uniform(n_in**-0.5))
        specs[f"b{n}"] = ArraySpec((n_out,), (out_axis,), init=uniform(n_in**-0.5))
    return specs


def _declare_lstm(virtual_tokens: int, hidden: int, inner: int) -> dict[str, Any]:
    """Two layers that read both ways, and one hidden layer; initial values as torch draws them."""

    def small(*shape: int, n_in: int) -> ArraySpec:
        return ArraySpec(shape, (None,) * len(shape), init=uniform(n_in**-0.5))

    def layer(n_in: int) -> Recurrence:
        rows = {
            "w_in": (2, n_in, 4 * inner),
            "w_back": (2, inner, 4 * inner),
            "b_in": (2, 4 * inner),
            "b_back": (2, 4 * inner),
        }
        return Recurrence(**{name: small(*shape, n_in=inner) for name, shape in rows.items()})  # type: ignore[arg-type]

    return {
        "table": ArraySpec((virtual_tokens, hidden), TABLE_AXES, init=normal(1.0)),
        "first": layer(hidden), "second": layer(2 * inner),
        "w1": small(2 * inner, 2 * inner, n_in=2 * inner), "b1": small(2 * inner, n_in=2 * inner),
        "w2": small(2 * inner, hidden, n_in=2 * inner), "b2": small(hidden, n_in=2 * inner),
    }  # fmt: skip


ENCODERS: dict[str, tuple[Callable[[int, int, int], dict[str, Any]], type]] = {
    "mlp": (_declare_mlp, EncodedPrompt),
    "lstm": (_declare_lstm, RecurrentPrompt),
}


def prompt_from(table: np.ndarray) -> Transform:
    """A prompt with given vectors [n, hidden], read from a file."""

    def declare(hidden: int) -> dict[str, ArraySpec]:
        return {"table": _given("prompt", table, (len(table), hidden), TABLE_AXES)}

    return _prompt("prompt_tuning", len(table), declare, Prompt)


def prefix_tuning(*, virtual_tokens: int) -> Transform:
    """Fresh keys and values for every layer."""
    return _prefix(lambda name, shape, axes: ArraySpec(shape, axes, init=SPREAD), virtual_tokens)


def prefix_from(values: Mapping[str, np.ndarray]) -> Transform:
    """Given keys and values: `{"k": [L, n, kv_heads * head_dim], "v": ...}`, read from a file, for a model of one stack."""
    return _prefix(lambda name, shape, axes: _given(name, values[name], shape, axes), values["k"].shape[-2])


def _prompt(method: str, number: int, declare: Callable[[int], dict[str, Any]], kind: type) -> Transform:
    def init(declared: Params) -> dict[str, Any]:
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
    return ArraySpec((number, hidden), TABLE_AXES, init=SPREAD)


def _given(name: str, value: np.ndarray, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> ArraySpec:
    if value.shape != shape:
        raise LlmtuneFormatError(
            f"adapter: its {name} has the shape {value.shape} where this model needs {shape}; it was made for another base model"
        )
    return ArraySpec(shape, axes, init=value)


def _check(method: str, number: int) -> None:
    if number < 1:
        raise LlmtuneConfigError(f"adapt.virtual_tokens: {method} needs 1 or more, got {number}")
