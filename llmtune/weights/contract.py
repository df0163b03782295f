"""The products of rows with matrices: what every door and every operator multiplies with.

contract          [batch, seq, i] x [i, o], or its transpose           rows that all see one matrix
expert_contract   sorted rows x [experts, i, o]                        each group of rows sees its own
own_vectors       [experts, i] -> one for each sorted row              what a row is stretched or moved by
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmtune.kernels import grouped_matmul
from llmtune.sharding import current, spec
from llmtune.weights.gather import gather, gather_inside, names_of, without


def contract(x: jax.Array, w: jax.Array, layout: str, out_axes: tuple[str | None, ...]) -> jax.Array:
    """[batch, seq, i] with a matrix laid out "io" or "oi" -> [batch, seq, o].

    Rows are flattened to two dimensions where the sequence is not sharded: XLA's CPU matmul runs at half the speed on three
    (facts: 37.7 ms against 25.1 ms for a SwiGLU MLP), other platforms do not mind. float32 is meant as float32: without
    the precision argument TPUs and GPUs round the operands to bfloat16 or TF32.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = spec(*out_axes)
    typed = jax.typeof(x).sharding.spec
    if typed[1] != out[1]:  # each device's part of the sum over `i`, scattered along the sequence
        part = PartitionSpec(out[0], typed[1], out[2], unreduced=frozenset(names_of(typed[2])))
        return jax.sharding.reshard(
            jnp.einsum(f"...i,{layout}->...o", x, w, precision=precision, out_sharding=part), out
        )
    if x.ndim != 3 or typed[1] is not None:
        return jnp.einsum(f"...i,{layout}->...o", x, w, precision=precision, out_sharding=out)
    batch, seq, width = x.shape
    rows = jax.lax.reshape(x, (batch * seq, width), out_sharding=PartitionSpec(typed[0], typed[2]))
    flat = jnp.einsum(f"ri,{layout}->ro", rows, w, precision=precision, out_sharding=PartitionSpec(out[0], out[2]))
    return jax.lax.reshape(flat, (batch, seq, flat.shape[-1]), out_sharding=out)


def expert_contract(x: jax.Array, w: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
    """`expert_linear` with an array, each device gathering what the strategy says, and multiplying what it sorted for itself."""
    rows, matrices, sizes = (jax.typeof(array).sharding.spec for array in (x, w, group_sizes))
    summed = without(matrices[1], current().gather)

    def own(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        w = gather_inside(w, tuple(matrices))
        out = grouped_matmul(x.reshape(x.shape[-2:]), w, sizes.reshape(sizes.shape[-1:]))
        out = out if summed is None else jax.lax.psum(out, summed)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    if jax.sharding.get_abstract_mesh().empty:
        return own(x, w, group_sizes)
    return jax.shard_map(own, in_specs=(rows, matrices, sizes), out_specs=spec(*out_axes), check_vma=False)(
        x, w, group_sizes
    )


def own_vectors(vectors: jax.Array, group_sizes: jax.Array, like: jax.Array) -> jax.Array:
    """[experts, width] -> of each sorted row its own expert's, laid out as the rows `like` [..., rows, width], in their dtype.

    Zeros beyond the groups. It is a product with ones and zeros: exact, and its gradient is a product too, where that of
    taking rows would be scatters.
    """
    precision = jax.lax.Precision.HIGHEST if like.dtype == jnp.float32 else None

    def own(vectors: jax.Array, sizes: jax.Array) -> jax.Array:
        sizes = sizes.reshape(sizes.shape[-1:])
        ends, row = jnp.cumsum(sizes), jnp.arange(like.shape[-2])[:, None]
        mine = ((ends - sizes <= row) & (row < ends)).astype(like.dtype)
        rows = jnp.matmul(mine, vectors, precision=precision)
        return rows.reshape(*[1] * (like.ndim - 2), *rows.shape)

    vectors = vectors.astype(like.dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return own(vectors, group_sizes)
    rows, sizes = (jax.typeof(array).sharding.spec for array in (like, group_sizes))
    laid = PartitionSpec(sizes[0], rows[-1])
    vectors = jax.sharding.reshard(gather(vectors), laid)
    return jax.shard_map(own, in_specs=(laid, sizes), out_specs=rows, check_vma=False)(vectors, group_sizes)
