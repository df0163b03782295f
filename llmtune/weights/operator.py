"""A weight is an array or an operator: a frozen pytree node that knows how to be multiplied by.

Operators nest (`LoRA(NF4(...), a, b, scale)` is QLoRA). Model code never sees which it holds: it goes through the doors of
`llmtune.weights.doors`. Every class is abstract (this one) or final; nothing outside `llmtune/weights` looks inside one.
"""

import abc
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import jax


class Operator(abc.ABC):
    """What every weight operator does. Subclasses are frozen dataclasses registered as pytree nodes, and final."""

    trainable: ClassVar[tuple[str, ...]] = ()  # the fields that training may change; all others stay frozen
    shared: ClassVar[tuple[str, ...]] = ()  # the fields that have no layer axis: one array serves all layers of a stack

    @abc.abstractmethod
    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """[batch, seq, in] -> [batch, seq, out], laid out as `out_axes` say."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The plain array [..., in, out] that it stands for, formed in float32."""

    def expert_apply(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """`expert_linear` with this weight of experts [experts, in, out]."""
        raise TypeError(f"{type(self).__name__} is not a weight of experts")

    def lookup(self, ids: jax.Array) -> jax.Array:
        """`embed_lookup` with this table [vocab, embed]."""
        raise TypeError(f"{type(self).__name__} is not a table of embeddings")

    def apply_transposed(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """`unembed`: x [batch, seq, out] times the transpose of this weight [in, out]."""
        raise TypeError(f"{type(self).__name__} has no product with its transpose")

    def with_key(self, key: jax.Array) -> "Operator":
        """The same weight for one training step: operators with dropout take the key (see `llmtune.weights.dropout`)."""
        del key
        return self

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of `dense()`."""

    @property
    @abc.abstractmethod
    def axes(self) -> tuple[str | None, ...]:
        """The logical axes of `dense()`, where the fields are declared (`ArraySpec`), not held."""


def is_operator(leaf: Any) -> bool:
    """For `is_leaf` of tree functions that map weights rather than arrays."""
    return isinstance(leaf, Operator)


def map_fields(function: Callable[[Any, bool], Any], weight: Any) -> Any:
    """`function(leaf, trainable)` over the arrays of one weight, operators inside operators included.

    A leaf is trainable where every operator on the way down names the field; a plain array is.
    """

    def descend(node: Any, trainable: bool) -> Any:
        if not isinstance(node, Operator):
            return function(node, trainable)
        names = {field.name for field in fields(node) if not field.metadata.get("static", False)}  # type: ignore[arg-type]
        children = {name: descend(getattr(node, name), trainable and name in node.trainable) for name in names}
        static = {field.name: getattr(node, field.name) for field in fields(node) if field.name not in names}  # type: ignore[arg-type]
        return type(node)(**children, **static)

    return descend(weight, True)
