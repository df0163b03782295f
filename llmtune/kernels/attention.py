"""Attention is one function: the mask is a small specification, the form is chosen by what the row needs.

Under a mesh the kernel runs inside `shard_map` with the layouts that its operands are typed with, so its body sees plain
arrays: batch and heads may be spread over devices, the sequence may not.
"""

import functools

import jax
from jax.sharding import PartitionSpec

from llmtune.kernels.blocked_attention import blocked_attention
from llmtune.kernels.dense_attention import dense_attention
from llmtune.kernels.masks import Mask
from llmtune.kernels.strip_attention import strip_attention

SHORT_ROW = 2048  # tokens up to which a strip's whole softmax is held


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    scale: float,
    q_offset: jax.Array | int = 0,
) -> jax.Array:
    """Softmax(scale * q k^T) v over what the mask leaves visible.

    q [batch, seq, heads, size]; k and v [batch, length, kv_heads, size], heads a multiple of kv_heads; segment ids int32
    [batch, seq] and [batch, length]; `q_offset` is the index of q's first token among the keys (decoding with a cache).
    Scores and softmax in float32, the result in q's dtype. A token that sees nothing gets zeros.
    """
    seq, length = q.shape[1], k.shape[1]
    decoding = seq != length or not isinstance(q_offset, int) or q_offset != 0
    if decoding:
        form, offsets = functools.partial(dense_attention, mask=mask, scale=scale), (q_offset,)
    else:
        rows = strip_attention if seq <= SHORT_ROW else blocked_attention
        form, offsets = functools.partial(rows, mask=mask, scale=scale), ()
    arrays = (q, k, v, q_segments, kv_segments)
    if jax.sharding.get_abstract_mesh().empty:
        return _call(form, arrays, offsets)
    layouts = tuple(jax.typeof(array).sharding.spec for array in arrays)
    if any(layout[1] is not None for layout in layouts):
        raise ValueError("attention: the sequence is sharded; this kernel needs whole rows on every device")
    body = functools.partial(_call_flat, form, len(arrays))
    specs = (*layouts, *(PartitionSpec() for _ in offsets))
    return jax.shard_map(body, in_specs=specs, out_specs=layouts[0], check_vma=False)(*arrays, *offsets)


def _call(form, arrays, offsets):
    return form(*arrays, q_offset=offsets[0]) if offsets else form(*arrays)


def _call_flat(form, count, *arguments):
    return _call(form, arguments[:count], arguments[count:])
