"""Attention is one function: the mask is a small specification, the back end is chosen by platform and by what is asked.

    platform   what it can be asked                                           back end
    tpu        bfloat16, rows of 128 tokens and more                          splash      Pallas
    nvidia     16 bits, one document per row (`Mask(packed=False)`)           cudnn       cuDNN
    any        rows of up to 2,048 tokens                                     strips      the reference, as XLA compiles it
    any        anything                                                       blocks      the reference, as XLA compiles it

The first line that can serve does; each back end says itself what it can serve (its `serves`), and none is ever asked for
another mask. All of them skip what causality and the window hide, rather than mask it; none holds a row's [seq, seq].

With dropout the last two serve, on every platform (`attention_dropout.py`).

Under a mesh the kernel runs inside `shard_map` with the layouts that its operands are typed with, so its body sees plain
arrays: batch and heads may be spread over devices, and the sequence too (`context_attention.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llmtune.kernels import cudnn, splash
from llmtune.kernels.attention_dropout import AttentionDropout
from llmtune.kernels.blocked_attention import blocked_attention
from llmtune.kernels.context_attention import with_keys_on_the_left
from llmtune.kernels.masks import Mask
from llmtune.kernels.platform import platform
from llmtune.kernels.strip_attention import strip_attention

SHORT_ROW = 2048  # tokens up to which a strip's whole softmax is held


@dataclass(frozen=True)
class BackEnd:
    """`attend(q, k, v, segments, *, mask, scale)` on plain arrays, and `dropped=` if it `drops`; `platform` None: all."""

    name: str
    platform: str | None
    serves: Callable[[Mask, jax.Array], bool]
    attend: Callable[..., jax.Array]
    drops: bool


BACK_ENDS = (
    BackEnd("splash", "tpu", splash.serves, splash.splash_attention, drops=False),
    BackEnd("cudnn", "nvidia", cudnn.serves, cudnn.cudnn_attention, drops=False),
    BackEnd("strips", None, lambda mask, q: q.shape[1] <= SHORT_ROW, strip_attention, drops=True),
    BackEnd("blocks", None, lambda mask, q: True, blocked_attention, drops=True),
)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    segments: jax.Array,
    scale: float,
    dropout: AttentionDropout | None = None,
) -> jax.Array:
    """Softmax(scale * q k^T) v over what the mask leaves visible, each row within itself.

    q [batch, seq, heads, size]; k and v [batch, seq, kv_heads, size], heads a multiple of kv_heads; segment ids int32
    [batch, seq]. Scores and softmax in float32, the result in q's dtype. A token of segment 0 gets zeros. `dropout`: that of
    this layer in this step.
    """
    axis = layout(q)[1]
    asked = mask if axis is None else replace(mask, packed=True, before=1)
    attend = back_end(platform(), asked, q, drops=dropout is not None).attend
    if axis is not None:
        attend = functools.partial(with_keys_on_the_left, attend, axis)
    attend = functools.partial(attend, mask=mask, scale=scale)
    if dropout is None:
        return on_each_device(attend, q, k, v, segments)

    def dropping(q, k, v, segments, rows, heads, words):
        first = 0 if axis is None else jax.lax.axis_index(axis) * q.shape[1]
        return attend(q, k, v, segments, dropped=replace(dropout, words=words).of_rows(rows, heads, first))

    return on_each_device(dropping, q, k, v, segments, numbers(q, 0), numbers(q, 2), dropout.words)


def back_end(on: str, mask: Mask, q: jax.Array, *, drops: bool = False) -> BackEnd:
    """The first back end of that platform that can serve a mask and queries of this shape and dtype, and drop if asked to."""
    return next(b for b in BACK_ENDS if b.platform in (None, on) and b.drops >= drops and b.serves(mask, q))


def numbers(x: jax.Array, axis: int) -> jax.Array:
    """uint32 0, 1, ... along an axis of the whole of x, laid out as that axis is."""
    out = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.PartitionSpec(layout(x)[axis])
    return jax.lax.broadcasted_iota(jnp.uint32, (x.shape[axis],), 0, out_sharding=out)


def on_each_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`kernel(*arrays)` on each device's own parts; the result is laid out like the first array."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    layouts = tuple(layout(array) for array in arrays)
    return jax.shard_map(kernel, in_specs=layouts, out_specs=layouts[0], check_vma=False)(*arrays)


def layout(array: jax.Array) -> jax.sharding.PartitionSpec:
    """The partition spec that an array is typed with."""
    return jax.typeof(array).sharding.spec
