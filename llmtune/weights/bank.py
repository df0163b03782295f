"""A bank of LoRA adapters, of which each row of a batch has its own.

    row i:  W x  -->  W x + scale[n] * B[n] A[n] x     with n = index[i]

`index` is a leaf like any other, filled in for each batch (`for_rows`), so that one compiled program serves whatever mixture of
adapters comes, and the model never knows. The base is read once for all rows. (Punica, Chen et al. 2023, arXiv:2310.18547,
gathers in its kernel; here the rows' factors are gathered first, r (in + out) numbers for each row.)
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from llmtune.errors import LlmtuneConfigError
from llmtune.sharding import placed_by_compiler, spec
from llmtune.weights.doors import Weight, linear
from llmtune.weights.gather import gather
from llmtune.weights.operator import Adapter


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bank(Adapter):
    """base [..., in, out], a [..., adapters, in, rank], b [..., adapters, rank, out] and scale [..., adapters].

    index int32 [..., batch]: the adapter of each row; None until rows are chosen. Nothing of a bank trains.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    index: jax.Array | None = None

    has_dense: ClassVar[bool] = False

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """[batch, seq, in] -> [batch, seq, out], each row through its own adapter."""
        if self.index is None:
            raise LlmtuneConfigError("bank: no adapter is chosen; say which with `bank.rows([...])`")
        if self.index.shape[-1] != x.shape[0]:
            raise LlmtuneConfigError(
                f"bank: adapters are chosen for {self.index.shape[-1]} rows, and {x.shape[0]} rows are given"
            )
        low = _by_row(x, _chosen(self.a, self.index), ("batch", "seq", "act_rank"))
        scale = placed_by_compiler(lambda scale, index: scale[index], "batch")(self.scale, self.index)
        low = scale.astype(x.dtype)[:, None, None] * low
        return linear(x, self.base, out_axes) + _by_row(low, _chosen(self.b, self.index), out_axes)

    def for_rows(self, index: jax.Array) -> "Bank":
        """The same bank with int32 [batch] adapters chosen, the same for every layer of a stack."""
        return replace(self, index=jnp.broadcast_to(index, (*self.scale.shape[:-1], *index.shape)))

    def dense(self) -> jax.Array:
        """Refused."""
        raise LlmtuneConfigError("Bank: each row has another matrix, so that it has no dense form")


def _chosen(factors: jax.Array, index: jax.Array) -> jax.Array:
    """[adapters, i, o] and int32 [batch] -> [batch, i, o]."""
    return placed_by_compiler(lambda factors, index: factors[index], "batch", None, None)(gather(factors), index)


def _by_row(x: jax.Array, factors: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
    """[batch, seq, i] times each row's own [batch, i, o]."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    factors = factors.astype(x.dtype)
    return jnp.einsum("bsi,bio->bso", x, factors, precision=precision, out_sharding=spec(*out_axes))
