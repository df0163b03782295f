"""Bottlenecks: a narrow network of two layers, placed after a matrix or beside a block.

    change(x) = relu(x @ down + down_bias) @ up + up_bias          Branch: down [in, size], up [size, out]

    W x  -->  W x + change(W x)           Bottleneck    sequential (Houlsby et al. 2019, arXiv:1902.00751, section 2.1;
                                                        Pfeiffer et al. 2021, arXiv:2005.00247, after the MLP alone)
    mlp(x)  -->  mlp(x) + scale * change(x)   Parallel  beside the MLP (He et al. 2022, arXiv:2110.04366, section 3.3)

After the matrices of experts each expert has a bottleneck of its own. A bias of the wrapped projection is added after the
adapter. Where `up` and `up_bias` are zero, nothing has changed.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, final

import jax
from jax.ad_checkpoint import checkpoint_name

from llmtune.errors import LlmtuneConfigError
from llmtune.weights.contract import own_vectors
from llmtune.weights.doors import Weight, add_bias, expert_linear, linear
from llmtune.weights.operator import Adapter, Node


class Nonlinear(Adapter):
    """An operator in the place of a matrix that is none: there is no plain array that it stands for."""

    has_dense: ClassVar[bool] = False
    base: Weight

    @abc.abstractmethod
    def change(self, y: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """What is added to the base's result y [batch, seq, out]."""

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base, and what its result is changed by."""
        y = linear(x, self.base, out_axes)
        return y + self.change(y, out_axes)

    def dense(self) -> jax.Array:
        """Refused."""
        raise LlmtuneConfigError(f"{type(self).__name__} is not linear and has no dense form; save_adapter serves it")


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branch(Node):
    """down [..., in, size], down_bias [..., size], up [..., size, out], up_bias [..., out]."""

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("down", "down_bias", "up", "up_bias")

    def change(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """[batch, seq, in] -> [batch, seq, out]."""
        low = add_bias(linear(x, self.down, ("batch", "seq", "act_rank")), self.down_bias)
        return add_bias(linear(jax.nn.relu(checkpoint_name(low, "low_rank")), self.up, out_axes), self.up_bias)

    def expert_change(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """The same for sorted rows, the fields being [experts, ...]."""
        low = expert_linear(x, self.down, group_sizes, (*out_axes[:-1], "act_rank"))
        low = checkpoint_name(low + own_vectors(self.down_bias, group_sizes, low), "low_rank")
        out = expert_linear(jax.nn.relu(low), self.up, group_sizes, out_axes)
        return out + own_vectors(self.up_bias, group_sizes, out)


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bottleneck(Nonlinear):
    """base [..., in, out] (an array or an operator) and a branch on its result."""

    base: Weight
    branch: Branch

    trainable: ClassVar[tuple[str, ...]] = ("branch",)

    def change(self, y: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """See `Nonlinear.change`."""
        return self.branch.change(y, out_axes)

    def expert_apply(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """Sorted rows through their expert's matrix, and then through its bottleneck."""
        y = expert_linear(x, self.base, group_sizes, out_axes)
        return y + self.branch.expert_change(y, group_sizes, out_axes)


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parallel(Node):
    """What fills the slot `mlp/adapter`: a branch on the block's input, and its scale [...] float32, which never trains."""

    branch: Branch
    scale: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("branch",)

    def change(self, x: jax.Array) -> jax.Array:
        """What is added to the block's result, [batch, seq, hidden]."""
        return self.scale.astype(x.dtype) * self.branch.change(x, ("batch", "seq", "act_embed"))
