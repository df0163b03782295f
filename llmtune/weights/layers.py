"""Stacked layers: which leaves of a tree of weights have a layer axis.

    {"q": VeRA(base [L, in, out], a [in, r], inner [L, r], ...)}
      --split_shared-->  {"q": VeRA(base, None, inner, ...)}, {"q": VeRA(None, a, None, ...)}     scanned, and closed over
      --layer(n)-->      {"q": VeRA(base [in, out], a [in, r], inner [r], ...)}

All do, but for the fields that an operator names as `shared`.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax

from llmtune.weights.operator import Operator, is_operator


def split_shared(tree: Any) -> tuple[Any, Any]:
    """(stacked, shared): two trees of one structure, each with None where the other has an array."""
    return _map(tree, lambda leaf, shared: None if shared else leaf), _map(
        tree, lambda leaf, shared: leaf if shared else None
    )


def join_shared(stacked: Any, shared: Any) -> Any:
    """The inverse of `split_shared`, also of one layer of the stack."""
    return jax.tree.map(lambda s, c: c if s is None else s, stacked, shared, is_leaf=lambda leaf: leaf is None)


def map_stacked(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` over every leaf that has a layer axis; shared ones as they are."""
    return _map(tree, lambda leaf, shared: leaf if shared or leaf is None else function(leaf))


def layer(tree: Any, number: Any) -> Any:
    """One layer of a stack."""
    return map_stacked(lambda leaf: leaf[number], tree)


def _map(tree: Any, function: Callable[[Any, bool], Any]) -> Any:
    def descend(node: Any, shared: bool) -> Any:
        if not isinstance(node, Operator):
            return function(node, shared)
        own = {field.name: field.metadata.get("static", False) for field in fields(node)}  # type: ignore[arg-type]
        return type(node)(
            **{
                name: getattr(node, name) if static else descend(getattr(node, name), shared or name in node.shared)
                for name, static in own.items()
            }
        )

    return jax.tree.map(lambda weight: descend(weight, False), tree, is_leaf=is_operator)
