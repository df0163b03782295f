"""The four doors: the only ways in which a model touches a weight, whatever the weight is.

    linear(x, w, out_axes), add_bias(x, b)          x @ w, and + b where there is one
    expert_linear(x, w, group_sizes, out_axes)      each group of rows times its own expert's matrix
    embed_lookup(ids, w), unembed(x, w, out_axes)   rows of a table, and the transpose for tied heads
    head_loss(hidden, w, targets, chunk=...)        log-probabilities of targets, without [batch, seq, vocab]

Arrays are multiplied here; operators bring their own `apply`. Weights are cast to the activations' dtype and then gathered
(so that 16-bit compute moves 16-bit bytes).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llmtune.kernels import grouped_matmul
from llmtune.sharding import current, placed_by_compiler, spec
from llmtune.weights.gather import gather
from llmtune.weights.operator import Operator

Weight = jax.Array | Operator


def linear(x: jax.Array, w: Weight, out_axes: tuple[str | None, ...]) -> jax.Array:
    """[batch, seq, in] x [in, out] -> [batch, seq, out] in x's dtype, laid out as `out_axes` say."""
    if isinstance(w, Operator):
        return w.apply(x, out_axes)
    return contract(x, gather(w.astype(x.dtype)), "io", out_axes)


def add_bias(x: jax.Array, b: jax.Array) -> jax.Array:
    """X [batch, seq, out] + b [out], in x's dtype."""
    return x + gather(b.astype(x.dtype))


def unembed(x: jax.Array, w: Weight, out_axes: tuple[str | None, ...]) -> jax.Array:
    """[batch, seq, embed] x the transpose of an embedding table [vocab, embed] -> [batch, seq, vocab]."""
    if isinstance(w, Operator):
        return w.apply_transposed(x, out_axes)
    return contract(x, gather(w.astype(x.dtype)), "oi", out_axes)


def embed_lookup(ids: jax.Array, w: Weight) -> jax.Array:
    """Rows of a table: int32 [batch, seq], [vocab, embed] -> [batch, seq, embed] in the table's dtype.

    Ids and table may both be sharded, which explicit axes refuse in a gather; XLA places this one.
    """
    if isinstance(w, Operator):
        return w.lookup(ids)
    lookup = placed_by_compiler(lambda ids, w: w.at[ids].get(mode="clip"), "batch", "seq", "act_embed")
    return lookup(ids, gather(w))


def expert_linear(x: jax.Array, w: Weight, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
    """Grouped matmul: rows [tokens, in] sorted by expert, [experts, in, out], int32 [experts] -> [tokens, out].

    Rows beyond the sum of the sizes come out as zeros. On a mesh, x [expert parts, batch parts, tokens, in] and group_sizes
    [expert parts, batch parts, own experts] hold what each device sorted for itself: nothing is exchanged but, where `in` is
    sharded, the sum over its parts.
    """
    if isinstance(w, Operator):
        return w.expert_apply(x, group_sizes, out_axes)
    return expert_contract(x, gather(w.astype(x.dtype)), group_sizes, out_axes)


def expert_contract(x: jax.Array, w: jax.Array, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
    """`expert_linear` with a gathered array, each device multiplying what it sorted for itself."""
    rows, matrices, sizes = (jax.typeof(array).sharding.spec for array in (x, w, group_sizes))
    summed = matrices[1]

    def own(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        out = grouped_matmul(x.reshape(x.shape[-2:]), w, sizes.reshape(sizes.shape[-1:]))
        out = out if summed is None else jax.lax.psum(out, summed)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    if jax.sharding.get_abstract_mesh().empty:
        return own(x, w, group_sizes)
    return jax.shard_map(own, in_specs=(rows, matrices, sizes), out_specs=spec(*out_axes), check_vma=False)(
        x, w, group_sizes
    )


def head_loss(hidden: jax.Array, w: Weight, targets: jax.Array, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and the log-sum-exp of its logits, both float32 [batch, seq].

    hidden [batch, seq, embed], targets int32 [batch, seq]. Logits exist for about `chunk` tokens of each row at a time:
    [batch, seq, vocab] is never held. The gradient with respect to `hidden` is formed beside the logits, in the forward pass;
    logits are formed again in the backward pass only where the head itself trains.
    """
    batch, seq, embed = hidden.shape
    pieces = max(1, math.ceil(seq / chunk))
    piece = functools.partial(_piece_of_head_loss, w)
    if pieces == 1:
        return _again(piece, in_scan=False)(hidden, targets)
    size = math.ceil(seq / pieces)
    padding = pieces * size - seq
    h = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, pieces, size, embed).swapaxes(0, 1)
    t = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, pieces, size).swapaxes(0, 1)
    _, out = jax.lax.scan(lambda _, chunk: (None, _again(piece, in_scan=True)(*chunk)), None, (h, t))
    log_probs, totals = (o.swapaxes(0, 1).reshape(batch, pieces * size)[:, :seq] for o in out)
    return log_probs, totals


def _piece_of_head_loss(w: Weight, h: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`head_loss` of one piece. Differentiation sees three parts, of which it follows those that are asked for.

    the logits of a constant h   to the weight
    (h - constant h) * toward    zero in value; d log_probs / d h = W (one_hot - softmax) = toward, already formed
    total of a constant weight   to h, where somebody differentiates the log-sum-exp (z-loss); else it merges with the first
    """
    out_axes = ("batch", "seq", "act_vocab")
    still_h, still_w = jax.lax.stop_gradient((h, w))
    logits = linear(still_h, w, out_axes).astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    hit = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2) == targets[..., None]
    log_probs = jnp.where(hit, logits, 0.0).sum(axis=-1) - total

    error = jax.lax.stop_gradient(hit - jnp.exp(logits - total[..., None])).astype(h.dtype)
    toward = jax.vjp(lambda h: linear(h, still_w, out_axes), still_h)[1](error)[0]
    toward = checkpoint_name(toward, "toward").astype(jnp.float32)
    log_probs += ((h - still_h).astype(jnp.float32) * toward).sum(axis=-1)

    total_of_h = jax.nn.logsumexp(linear(h, still_w, out_axes).astype(jnp.float32), axis=-1)
    return log_probs, total + (total_of_h - jax.lax.stop_gradient(total_of_h))


def _again(piece: Callable, *, in_scan: bool) -> Callable:
    """Keeps the gradient towards h for the backward pass, and nothing of the logits."""
    policy = jax.checkpoint_policies.save_only_these_names("toward")
    return jax.checkpoint(piece, prevent_cse=not in_scan, policy=policy)  # a scan by itself keeps both passes apart


def contract(x: jax.Array, w: jax.Array, layout: str, out_axes: tuple[str | None, ...]) -> jax.Array:
    """[batch, seq, i] with a matrix laid out "io" or "oi" -> [batch, seq, o].

    Rows are flattened to two dimensions where the sequence is not sharded: XLA's CPU matmul runs at half the speed on three
    (facts: 37.7 ms against 25.1 ms for a SwiGLU MLP), other platforms do not mind. float32 is meant as float32: without
    the precision argument TPUs and GPUs round the operands to bfloat16 or TF32.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = spec(*out_axes)
    rows_sharded_by_seq = current().spec("seq")[0] is not None
    if x.ndim != 3 or rows_sharded_by_seq:
        return jnp.einsum(f"...i,{layout}->...o", x, w, precision=precision, out_sharding=out)
    batch, seq, width = x.shape
    typed = jax.typeof(x).sharding.spec
    rows = jax.lax.reshape(x, (batch * seq, width), out_sharding=PartitionSpec(typed[0], typed[2]))
    flat = jnp.einsum(f"ri,{layout}->ro", rows, w, precision=precision, out_sharding=PartitionSpec(out[0], out[2]))
    return jax.lax.reshape(flat, (batch, seq, flat.shape[-1]), out_sharding=out)
