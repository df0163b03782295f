"""Merge: operators -> the plain arrays they stand for, formed in float32 (DESIGN: cast once, by whoever stores them).

What is no matrix has no such array and is refused by name: bottlenecks, what fills a slot, a bank.
"""

from typing import Any

import jax

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms.select import weights_by_path
from llmtune.weights import Operator, beneath, dense, is_adapter, is_operator, without_dense


def not_mergeable(params: Any) -> tuple[str, str] | None:
    """(path, what is there) of the first weight for which no plain array can stand; None where all merge."""
    nodes = ((path, without_dense(weight)) for path, weight in weights_by_path(params).items())
    return next(((path, type(node).__name__) for path, node in nodes if node is not None), None)


def refuse_without_dense(params: Any) -> None:
    """Raise LlmtuneConfigError naming the first weight for which no plain array can stand."""
    found = not_mergeable(params)
    if found is not None:
        raise LlmtuneConfigError(
            f"merge: {found[0]} holds {found[1]}, which no matrix can stand for; save_adapter() writes the adapter, and the "
            "base stays as it is"
        )


def without_adapters(params: Any) -> Any:
    """What the adapters stand on: LoRA(NF4(codes), a, b) -> NF4(codes)."""
    return jax.tree.map(lambda w: beneath(w) if is_adapter(w) else w, params, is_leaf=is_operator)


def merge(params: Any) -> Any:
    """Every operator replaced by its dense float32 array; plain arrays as they are."""
    refuse_without_dense(params)
    return jax.tree.map(lambda w: dense(w) if isinstance(w, Operator) else w, params, is_leaf=is_operator)
