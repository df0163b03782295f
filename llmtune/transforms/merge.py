"""Merge: operators -> the plain arrays they stand for, formed in float32 (DESIGN: cast once, by whoever stores them)."""

from typing import Any

import jax

from llmtune.weights import Operator, dense, is_operator


def merge(params: Any) -> Any:
    """Every operator replaced by its dense float32 array; plain arrays as they are."""
    return jax.tree.map(lambda w: dense(w) if isinstance(w, Operator) else w, params, is_leaf=is_operator)
