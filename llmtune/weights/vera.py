"""VeRA: random projections that all layers share, and two small vectors that train (Kopiczko et al. 2024, arXiv:2310.11454).

    W x  -->  W x + B' diag(d) A' x, B' = diag(b) B      here:  x @ base + ((x @ a) * inner) @ b * outer      (equation 2)

`a` and `b` are as large as the largest adapted matrix; each weight uses their first rows and columns. They have no layer axis:
one array serves all layers and all matrices, experts among them, and is closed over, not scanned.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llmtune.sharding import spec
from llmtune.weights.contract import contract, own_vectors
from llmtune.weights.doors import Weight, expert_linear, linear
from llmtune.weights.dropout import drop
from llmtune.weights.gather import gather
from llmtune.weights.lora import narrow
from llmtune.weights.materialized import dense
from llmtune.weights.operator import Adapter


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VeRA(Adapter):
    """base [..., in, out]; a [>= in, rank] and b [rank, >= out], frozen and shared; inner [..., rank]; outer [..., out]."""

    base: Weight
    a: jax.Array
    b: jax.Array
    inner: jax.Array
    outer: jax.Array
    key: jax.Array | None = None
    dropout: float = field(default=0.0, metadata={"static": True})

    trainable: ClassVar[tuple[str, ...]] = ("inner", "outer")
    shared: ClassVar[tuple[str, ...]] = ("a", "b")

    def apply(self, x: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """X @ base + ((x @ a) * inner) @ b * outer."""
        a, b = self._projections(x, out_axes[-1])
        low = contract(drop(x, self.key, self.dropout), a, "io", narrow(out_axes))
        low = checkpoint_name(low, "low_rank") * gather(self.inner).astype(x.dtype)
        outer = gather(self.outer).astype(x.dtype)
        return linear(x, self.base, out_axes) + contract(low, b, "io", out_axes) * outer

    def expert_apply(self, x: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
        """The same for sorted rows: all see the shared matrices, each the vectors of its own expert."""
        a, b = self._projections(x, out_axes[-1])
        low = contract(drop(x, self.key, self.dropout), a, "io", narrow(out_axes))
        low = checkpoint_name(low, "low_rank") * own_vectors(self.inner, group_sizes, low)
        out = contract(low, b, "io", out_axes)
        return expert_linear(x, self.base, group_sizes, out_axes) + out * own_vectors(self.outer, group_sizes, out)

    def _projections(self, x: jax.Array, out_axis: str | None) -> tuple[jax.Array, jax.Array]:
        """What this weight uses of the shared matrices, in x's dtype, laid out to multiply it."""
        n_in, n_out = self.shape[-2:]
        a = jax.sharding.reshard(self.a[:n_in].astype(x.dtype), PartitionSpec(jax.typeof(x).sharding.spec[-1], None))
        b = jax.sharding.reshard(self.b[:, :n_out].astype(x.dtype), PartitionSpec(None, spec(out_axis)[0]))
        return a, b

    def dense(self) -> jax.Array:
        """Base + (a * inner) @ b * outer, in float32."""
        n_in, n_out = self.shape[-2:]
        product = jnp.matmul(
            self.a[:n_in] * self.inner[..., None, :], self.b[:, :n_out], precision=jax.lax.Precision.HIGHEST
        )
        return dense(self.base) + product * self.outer[..., None, :]

    def with_key(self, key: jax.Array) -> "VeRA":
        """A key for each layer of the stack."""
        if self.dropout == 0:
            return self
        layers = self.inner.shape[:-1][:1]
        return replace(self, key=jax.random.split(key, layers) if layers else key)
