"""IA3: what goes into a matrix, or comes out of it, is stretched (Liu et al. 2022, arXiv:2205.05638, section 3.3).

side "out" (keys, values):          W x  -->  l * (W x)         x @ base * gain
side "in" (the hidden MLP layer):   W x  -->  W (l * x)         (x * gain) @ base
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import jax
import jax.numpy as jnp

from llmtune.weights.doors import Weight, linear
from llmtune.weights.gather import gather
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Operator


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IA3(Operator):
    """base [..., in, out]; gain [..., out] or [..., in] by `side`; on [...]: 1, or 0 for a layer that is not adapted."""

    base: Weight
    gain: jax.Array
    on: jax.Array
    side: Literal["in", "out"] = field(default="out", metadata={"static": True})

    trainable: ClassVar[tuple[str, ...]] = ("gain",)

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base, stretched before or after."""
        gain = jnp.where(self.on == 0, 1.0, gather(self.gain)).astype(x.dtype)
        if self.side == "in":
            return linear(x * gain, self.base, out_axes)
        return linear(x, self.base, out_axes) * gain

    def dense(self) -> jax.Array:
        """Rows or columns of the base stretched, in float32."""
        gain = jnp.where(self.on[..., None] == 0, 1.0, self.gain)
        return dense(self.base) * (gain[..., None] if self.side == "in" else gain[..., None, :])

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out], that of the base."""
        return tuple(self.base.shape)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Those of the base."""
        return self.base.axes  # type: ignore[union-attr]
