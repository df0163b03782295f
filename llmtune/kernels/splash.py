"""Attention on TPUs: the splash kernel of Pallas, in blocks that live in vector memory; hidden blocks are never visited.

    q [batch, seq, heads, size] --> [batch, heads, padded, size]     padded: a multiple of 128, the rest in segment 0
                                                                     blocks: the widest up to 512 that divide it

Key heads are not repeated: the kernel finds the key head of each query head. It knows no scale, so queries are scaled before
it, and no padding, so its results there are set to zero after it (and with them their gradients). The backward pass is two
kernels of their own, one for queries and one for keys and values: the fused one would hold a gradient of the queries per
block of keys. Products are of 16-bit numbers; float32 rows take the reference, whose products are exact on every platform.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llmtune.kernels.masks import Mask

LANES = 128  # of a vector register: blocks are multiples of it
WIDEST = 512  # a block of 2048 no longer fits the vector memory beside its gradients (compiled for v5e)
WIDEST_HEAD = 256


def serves(mask: Mask, q: jax.Array) -> bool:
    """Whether the kernel can do this attention: any mask, bfloat16, rows of at least one block, heads in whole tiles."""
    seq, size = q.shape[1], q.shape[3]
    return q.dtype == jnp.bfloat16 and seq >= LANES and size % 8 == 0 and size <= WIDEST_HEAD


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    mask: Mask,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Q [batch, seq, heads, size], k and v [batch, before + seq, kv_heads, size] -> like q. Softmax in float32."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here: importing Pallas takes a second

    seq, heads = q.shape[1], q.shape[2]
    padded, front = -(-seq // LANES) * LANES, -mask.before % LANES
    before = mask.before + front
    block_q, block_kv = _widest_block(padded), _widest_block(before + padded)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_mask(mask, padded, before)] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def pad(x: jax.Array, front: int = front) -> jax.Array:
        return jnp.pad(x, ((0, 0), (front, padded - seq), *((0, 0),) * (x.ndim - 2)))

    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    rows = (x.swapaxes(1, 2) for x in (pad(scaled, 0), pad(k), pad(v)))
    own = segments[:, mask.before :]
    out: Any = jax.vmap(kernel)(*rows, splash.SegmentIds(pad(own, 0), pad(segments)))
    return jnp.where(own[:, :, None, None] > 0, out.swapaxes(1, 2)[:, :seq], 0)


def _widest_block(length: int) -> int:
    return next(width for width in range(WIDEST, 0, -LANES) if length % width == 0)


def _mask(mask: Mask, seq: int, before: int):
    """The same specification in the kernel's words: how many tokens to the left and to the right are seen.

    Query i stands at the place before + i of the keys.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, left = (seq, before + seq), None if mask.window is None else mask.window - 1
    if left is None:
        return splash.CausalMask(shape, offset=before) if mask.causal else splash.FullMask(shape)
    return splash.LocalMask(shape, window_size=(left, 0 if mask.causal else None), offset=before)
