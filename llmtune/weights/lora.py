"""LoRA: a frozen base plus a trainable low-rank product (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    W x  -->  W x + scale * B A x        here, with matrices [in, out]:  x @ base + scale * (x @ a) @ b

`scale` is alpha / rank, or alpha / sqrt(rank) with rank stabilisation (Kalajdzievski 2023, arXiv:2312.03732). It is an array
(one number per layer of a stacked weight) and is never trained. Where layers have different ranks, a and b are padded with
zeros to the largest: the product is unchanged, and the padding's gradients are zero on both sides.
"""

from dataclasses import dataclass, field
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmtune.weights.doors import Weight, linear
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Operator


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA(Operator):
    """base [..., in, out] (an array or an operator), a [..., in, rank], b [..., rank, out], scale [...] float32.

    `ranks`: the true rank of each stacked layer where they differ; `rslora`: how `scale` came from alpha, for export.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    ranks: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    rslora: bool = field(default=False, metadata={"static": True})

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base + (scale * x @ a) @ b: scaled where it is narrow."""
        low = checkpoint_name(linear(x, self.a, ("batch", "seq", "act_rank")), "low_rank")
        return linear(x, self.base, out_axes) + linear(self.scale.astype(x.dtype) * low, self.b, out_axes)

    def dense(self) -> jax.Array:
        """Base + scale * a @ b, in float32."""
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        return dense(self.base) + self.scale[..., None, None] * product

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out], that of the base."""
        return tuple(self.base.shape)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Those of the base."""
        return self.base.axes  # type: ignore[union-attr]
