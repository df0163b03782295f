"""LoRA: a frozen base plus a trainable low-rank product (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    W x  -->  W x + scale * B A x        here, with matrices [in, out]:  x @ base + scale * (x @ a) @ b

`scale` is alpha / rank, or alpha / sqrt(rank) with rank stabilisation (Kalajdzievski 2023, arXiv:2312.03732). It is an array
(one number per layer of a stacked weight) and is never trained. Where layers have different ranks, a and b are padded with
zeros to the largest: the product is unchanged, and the padding's gradients are zero on both sides.

The same node adapts a weight of experts, each with factors of its own, and a table of embeddings.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmtune.weights.doors import Weight, embed_lookup, expert_linear, linear, unembed
from llmtune.weights.dropout import drop
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Adapter


def narrow(out_axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The layout of x @ a for a product laid out as `out_axes`: rows stay whole, what is narrow is not worth scattering."""
    return (*("seq" if axis == "residual_seq" else axis for axis in out_axes[:-1]), "act_rank")


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA(Adapter):
    """base [..., in, out] (an array or an operator), a [..., in, rank], b [..., rank, out], scale [...] float32.

    `ranks`: the true rank of each stacked layer where they differ; `rslora`: how `scale` came from alpha, for export;
    `taken`: the product is what an initialiser took out of the base, and is a part of the adapter that is around it;
    `dropout`: the rate at which the input of the product is dropped while `key` is filled in (`llmtune.weights.dropout`).
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    key: jax.Array | None = None
    ranks: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    rslora: bool = field(default=False, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
    taken: bool = field(default=False, metadata={"static": True})

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base + (scale * x @ a) @ b."""
        return linear(x, self.base, out_axes) + self.product(drop(x, self.key, self.dropout), out_axes)

    def product(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """(scale * x @ a) @ b: scaled where it is narrow."""
        low = checkpoint_name(linear(x, self.a, narrow(out_axes)), "low_rank")
        return linear(self.scale.astype(x.dtype) * low, self.b, out_axes)

    def expert_apply(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """The same for sorted rows of experts."""
        out = self.expert_product(drop(x, self.key, self.dropout), group_sizes, out_axes)
        return expert_linear(x, self.base, group_sizes, out_axes) + out

    def expert_product(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """See `product`; the scale is one number per expert, so that it goes with b."""
        low = expert_linear(x, self.a, group_sizes, (*out_axes[:-1], "act_rank"))
        scaled = self.scale[:, None, None] * self.b
        return expert_linear(checkpoint_name(low, "low_rank"), scaled, group_sizes, out_axes)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of base + scale * a @ b; an embedding's input are ids, of which none is dropped."""
        rows = embed_lookup(ids, self.base)
        low = (self.scale * embed_lookup(ids, self.a)).astype(rows.dtype)
        return rows + linear(low, self.b, ("batch", "seq", "act_embed"))

    def apply_transposed(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base.T + (scale * x @ b.T) @ a.T: a tied head under an adapted table."""
        low = unembed(x, self.b, (*out_axes[:-1], "act_rank"))
        return unembed(x, self.base, out_axes) + unembed(self.scale.astype(x.dtype) * low, self.a, out_axes)

    def dense(self) -> jax.Array:
        """Base + scale * a @ b, in float32."""
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        return dense(self.base) + self.scale[..., None, None] * product

    def with_key(self, key: jax.Array) -> "LoRA":
        """A key for each layer of the stack."""
        if self.dropout == 0:
            return self
        layers = self.scale.shape[:1]
        return replace(self, key=jax.random.split(key, layers) if layers else key)
