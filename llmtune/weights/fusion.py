"""AdapterFusion: attention over the changes of several trained adapters (Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2).

    y = W x,   z_n = change_n(y)                              the adapters, frozen
    s = softmax over n of  (y @ query) . (z_n @ key)          which of them, for this very token
    W x  -->  y + sum over n of  s_n * (z_n @ value)

Only query, key and value train. With `value` the identity and small queries it begins as the mean of the adapters. Values are
formed of the change alone, so that the base's own result passes untouched.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from llmtune.weights.bottleneck import Branch, Nonlinear
from llmtune.weights.doors import Weight, linear


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fusion(Nonlinear):
    """base [..., in, out]; `branches`: adapters stacked, down [..., adapters, out, size]; query, key, value [..., out, out]."""

    base: Weight
    branches: Branch
    query: jax.Array
    key: jax.Array
    value: jax.Array

    trainable: ClassVar[tuple[str, ...]] = ("query", "key", "value")

    def change(self, y: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """See `Nonlinear.change`; scores and softmax in float32."""
        adapters = range(self.branches.down.shape[0])
        changes = [jax.tree.map(lambda leaf, n=n: leaf[n], self.branches).change(y, out_axes) for n in adapters]
        asked = linear(y, self.query, out_axes).astype(jnp.float32)
        scores = [(asked * linear(z, self.key, out_axes).astype(jnp.float32)).sum(-1, keepdims=True) for z in changes]
        shares = jax.nn.softmax(jnp.stack(scores), axis=0).astype(y.dtype)
        mixed = sum((shares[n] * z for n, z in enumerate(changes)), jnp.zeros_like(y))
        return linear(mixed, self.value, out_axes)
