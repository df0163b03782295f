"""Attention on NVIDIA GPUs, where each row is one document: cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

    segments   1 1 1 1 0 0   -->   length 4        one document, then padding: what the kernel can be told
               1 1 2 2 2 0   -->   NaN             packed although the mask says it is not: loud, never a leak

Through JAX's public interface the kernel takes a length per row and no segment ids; documents could only be told apart by a
bias of [batch, 1, seq, seq], which is quadratic in memory and computes every block. Packed rows therefore take the
reference (strips, or blocks for long rows) as XLA compiles it: linear in memory, blocks beyond the triangle or the window
skipped, exact. `Mask.packed` says which of the two a caller has, since segment ids are not known when a program is compiled.

Padding is set to zero before the kernel and after it, so that whatever it leaves there reaches neither results nor gradients.
"""

import jax
import jax.numpy as jnp

from llmtune.kernels.masks import Mask

WIDEST_HEAD = 128  # Hopper takes more; no model of these families has more


def serves(mask: Mask, q: jax.Array) -> bool:
    """Whether the kernel can do this attention: unpacked rows, causal where there is a window, 16 bits, heads in eights."""
    size = q.shape[3]
    sixteen = q.dtype in (jnp.bfloat16, jnp.float16)
    windowed = mask.causal or mask.window is None
    return not mask.packed and not mask.before and windowed and sixteen and size % 8 == 0 and size <= WIDEST_HEAD


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, mask: Mask, scale: float
) -> jax.Array:
    """Q [batch, seq, heads, size], k and v [batch, seq, kv_heads, size] -> like q. Softmax in float32."""
    real = (segments > 0)[:, :, None, None]
    lengths = (segments > 0).sum(1, dtype=jnp.int32)
    whole = jnp.where(jnp.arange(q.shape[1]) < lengths[:, None], segments[:, :1], 0)  # one document, then padding
    kept = (segments == whole).all(1)[:, None, None, None]
    counted = jnp.maximum(lengths, 1)  # a row of padding alone: its first token sees itself
    out = jax.nn.dot_product_attention(
        *(jnp.where(real, x, 0) for x in (q, k, v)),
        scale=scale,
        is_causal=mask.causal,
        query_seq_lengths=counted,
        key_value_seq_lengths=counted,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return jnp.where(kept, jnp.where(real, out, 0), jnp.nan)
