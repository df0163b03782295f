"""IA3: what goes into a matrix, or comes out of it, is stretched (Liu et al. 2022, arXiv:2205.05638, section 3.3).

side "out" (keys, values):          W x  -->  l * (W x)         x @ base * gain
side "in" (the hidden MLP layer):   W x  -->  W (l * x)         (x * gain) @ base

Of experts each has a vector of its own.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import jax
import jax.numpy as jnp

from llmtune.weights.contract import own_vectors
from llmtune.weights.doors import Weight, expert_linear, linear
from llmtune.weights.gather import gather
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Adapter


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IA3(Adapter):
    """base [..., in, out]; gain [..., out] or [..., in] by `side`; on [...]: 1, or 0 for a layer that is not adapted."""

    base: Weight
    gain: jax.Array
    on: jax.Array
    side: Literal["in", "out"] = field(default="out", metadata={"static": True})

    trainable: ClassVar[tuple[str, ...]] = ("gain",)

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base, stretched before or after."""
        gain = self._gain().astype(x.dtype)
        if self.side == "in":
            return linear(x * gain, self.base, out_axes)
        return linear(x, self.base, out_axes) * gain

    def expert_apply(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """The same for sorted rows, each stretched by its own expert's vector."""
        if self.side == "in":
            return expert_linear(x * own_vectors(self._gain(), group_sizes, x), self.base, group_sizes, out_axes)
        out = expert_linear(x, self.base, group_sizes, out_axes)
        return out * own_vectors(self._gain(), group_sizes, out)

    def _gain(self) -> jax.Array:
        """What is multiplied by, float32 [out] or [in], of experts [experts, ...]."""
        return jnp.where(self.on[..., None] == 0, 1.0, gather(self.gain))

    def dense(self) -> jax.Array:
        """Rows or columns of the base stretched, in float32."""
        gain = jnp.where(self.on[..., None] == 0, 1.0, self.gain)
        return dense(self.base) * (gain[..., None] if self.side == "in" else gain[..., None, :])
