"""Attention is one function: the mask is a small specification, the form is chosen by what the row needs.

Under a mesh the kernel runs inside `shard_map` with the layouts that its operands are typed with, so its body sees plain
arrays: batch and heads may be spread over devices, the sequence may not.
"""

import functools
from collections.abc import Callable

import jax

from llmtune.kernels.blocked_attention import blocked_attention
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
) -> jax.Array:
    """Softmax(scale * q k^T) v over what the mask leaves visible.

    q [batch, seq, heads, size]; k and v [batch, seq, kv_heads, size], heads a multiple of kv_heads; segment ids int32
    [batch, seq]. Scores and softmax in float32, the result in q's dtype. A token that sees nothing gets zeros.
    """
    if any(layout(array)[1] is not None for array in (q, k, v, q_segments, kv_segments)):
        raise ValueError("attention: the sequence is sharded; this kernel needs whole rows on every device")
    form = strip_attention if q.shape[1] <= SHORT_ROW else blocked_attention
    return on_each_device(functools.partial(form, mask=mask, scale=scale), q, k, v, q_segments, kv_segments)


def on_each_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`kernel(*arrays)` on each device's own parts; the result is laid out like the first array."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    layouts = tuple(layout(array) for array in arrays)
    return jax.shard_map(kernel, in_specs=layouts, out_specs=layouts[0], check_vma=False)(*arrays)


def layout(array: jax.Array) -> jax.sharding.PartitionSpec:
    """The partition spec that an array is typed with."""
    return jax.typeof(array).sharding.spec
