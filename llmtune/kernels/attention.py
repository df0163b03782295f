"""Attention is one function: the mask is a small specification, the back end is chosen by platform and by what is asked.

    platform   what it can be asked                                           back end
    tpu        bfloat16, rows of 128 tokens and more                          splash      Pallas
    nvidia     16 bits, one document per row (`Mask(packed=False)`)           cudnn       cuDNN
    any        rows of up to 2,048 tokens                                     strips      the reference, as XLA compiles it
    any        anything                                                       blocks      the reference, as XLA compiles it

The first line that can serve does; each back end says itself what it can serve (its `serves`), and none is ever asked for
another mask. All of them skip what causality and the window hide, rather than mask it; none holds a row's [seq, seq].

Under a mesh the kernel runs inside `shard_map` with the layouts that its operands are typed with, so its body sees plain
arrays: batch and heads may be spread over devices, and the sequence too (`context_attention.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from llmtune.kernels import cudnn, splash
from llmtune.kernels.blocked_attention import blocked_attention
from llmtune.kernels.context_attention import with_keys_on_the_left
from llmtune.kernels.masks import Mask
from llmtune.kernels.platform import platform
from llmtune.kernels.strip_attention import strip_attention

SHORT_ROW = 2048  # tokens up to which a strip's whole softmax is held


@dataclass(frozen=True)
class BackEnd:
    """`attend(q, k, v, segments, *, mask, scale)` on plain arrays; `platform` None: all of them."""

    name: str
    platform: str | None
    serves: Callable[[Mask, jax.Array], bool]
    attend: Callable[..., jax.Array]


BACK_ENDS = (
    BackEnd("splash", "tpu", splash.serves, splash.splash_attention),
    BackEnd("cudnn", "nvidia", cudnn.serves, cudnn.cudnn_attention),
    BackEnd("strips", None, lambda mask, q: q.shape[1] <= SHORT_ROW, strip_attention),
    BackEnd("blocks", None, lambda mask, q: True, blocked_attention),
)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, segments: jax.Array, scale: float) -> jax.Array:
    """Softmax(scale * q k^T) v over what the mask leaves visible, each row within itself.

    q [batch, seq, heads, size]; k and v [batch, seq, kv_heads, size], heads a multiple of kv_heads; segment ids int32
    [batch, seq]. Scores and softmax in float32, the result in q's dtype. A token of segment 0 gets zeros.
    """
    axis = layout(q)[1]
    if axis is not None:
        choice = back_end(platform(), replace(mask, packed=True, before=1), q)
        kernel = functools.partial(with_keys_on_the_left, choice.attend, axis, mask, scale=scale)
        return on_each_device(kernel, q, k, v, segments)
    attend = back_end(platform(), mask, q).attend
    return on_each_device(functools.partial(attend, mask=mask, scale=scale), q, k, v, segments)


def back_end(on: str, mask: Mask, q: jax.Array) -> BackEnd:
    """The first back end of that platform that can serve a mask and queries of this shape and dtype."""
    return next(b for b in BACK_ENDS if b.platform in (None, on) and b.serves(mask, q))


def on_each_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`kernel(*arrays)` on each device's own parts; the result is laid out like the first array."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    layouts = tuple(layout(array) for array in arrays)
    return jax.shard_map(kernel, in_specs=layouts, out_specs=layouts[0], check_vma=False)(*arrays)


def layout(array: jax.Array) -> jax.sharding.PartitionSpec:
    """The partition spec that an array is typed with."""
    return jax.typeof(array).sharding.spec
