"""Quantisation as a transform: the selected matrices kept as codes, frozen.

    {"q": {"kernel": W}}   -->   {"q": {"kernel": NF4(codes, absmax, ...)}}

`apply` maps declarations to declarations, from which everything follows (shardings, memory, and loading: `pretrained.load`
encodes each layer as it is read, so that the 16-bit matrices never exist together), and arrays to their codes.
An adapter goes on top: `chain(quantize("nf4"), lora(rank=16, alpha=32))` is QLoRA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms.select import EMBEDDING, HEAD, select, weights_by_path
from llmtune.transforms.transform import Params, Transform, chain
from llmtune.weights import FORMATS, NF4, ArraySpec, Quantized, is_operator, path_name

LOOKED_UP = "the embedding is looked up, not multiplied by; leave it out"


class Choice(Protocol):
    """The arguments of `quantize`, as one record."""

    @property
    def base(self) -> str:
        """See `quantize`."""
        ...

    @property
    def double(self) -> bool:
        """See `quantize`."""
        ...

    @property
    def targets(self) -> str | Sequence[str]:
        """See `quantize`."""
        ...


def quantize_each(choices: Sequence[Choice]) -> Transform:
    """Several of them, each for matrices of its own."""
    keys = [f"quantize.{n}" if len(choices) > 1 else "quantize" for n in range(len(choices))]
    return chain(
        *(
            quantize(own.base, double=own.double, targets=own.targets, key=key)
            for own, key in zip(choices, keys, strict=True)
        )
    )


def quantize(
    base: str, *, double: bool = True, targets: str | Sequence[str] = "layers", key: str = "quantize"
) -> Transform:
    """`base`: nf4, int4, int8 or fp8; `double`: nf4's magnitudes in 8 bits. A leaf that is quantised already is an error.

    `key`: how errors name the section.
    """
    if base not in FORMATS:
        raise LlmtuneConfigError(f"{key}.base: {base!r} is no format; there are {', '.join(FORMATS)}")
    form = functools.partial(NF4.declare, double=double) if base == "nf4" else FORMATS[base]

    def init(declared: Params) -> dict[str, Any]:
        apply(declared, {})  # refuses before anything is read
        return {}

    def apply(params: Params, additions: Any) -> Params:
        del additions
        _refuse_table(params, [targets] if isinstance(targets, str) else targets, f"{key}.targets")
        chosen = set(select(params, targets, key=f"{key}.targets", both_ends=True))

        def change(path: tuple[Any, ...], weight: Any) -> Any:
            name = path_name(path)
            return _quantised(name, weight, form, f"{key}.targets") if name in chosen else weight

        return jax.tree_util.tree_map_with_path(change, params, is_leaf=is_operator)

    return Transform(init, apply)


def _refuse_table(params: Params, rules: Sequence[str], key: str) -> None:
    """The embedding by its name, and a head that is the embedding: it is no matter of adapters, as `select` would say."""
    if "embed_tokens" in rules:
        raise LlmtuneConfigError(f"{key}: {LOOKED_UP}")
    if "lm_head" in rules and HEAD not in weights_by_path(params):
        raise LlmtuneConfigError(
            f"{key}: lm_head: this model's head is tied to its embedding, which is never quantised; leave it out"
        )


def _quantised(path: str, weight: Any, form: Callable[[ArraySpec], Quantized], key: str) -> Quantized:
    if path == EMBEDDING:
        raise LlmtuneConfigError(f"{key}: {LOOKED_UP}")
    if isinstance(weight, Quantized):
        raise LlmtuneConfigError(f"{key}: {path} is quantised already; leave it out")
    if is_operator(weight):
        raise LlmtuneConfigError(f"{key}: {path} carries an adapter; quantise first, then adapt")
    if isinstance(weight, ArraySpec):
        return form(weight)
    return form(ArraySpec(weight.shape, (None,) * weight.ndim)).encode(weight)
