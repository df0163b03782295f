"""The four doors: the only ways in which a model touches a weight, whatever the weight is.

    linear(x, w, out_axes), add_bias(x, b)          x @ w, and + b where there is one
    expert_linear(x, w, group_sizes, out_axes)      each group of rows times its own expert's matrix
    embed_lookup(ids, w), unembed(x, w, out_axes)   rows of a table, and the transpose for tied heads
    head_loss(hidden, w, targets, chunk=...)        log-probabilities of targets (in `head_loss.py`)

Arrays are multiplied here; operators bring their own `apply`. Weights are cast to the activations' dtype and then gathered
(so that 16-bit compute moves 16-bit bytes).
"""

import jax

from llmtune.sharding import placed_by_compiler
from llmtune.weights.contract import contract, expert_contract
from llmtune.weights.gather import gather, gather_to_multiply
from llmtune.weights.lookup import take_rows
from llmtune.weights.narrow import narrow
from llmtune.weights.operator import Operator

Weight = jax.Array | Operator


def linear(x: jax.Array, w: Weight, out_axes: tuple[str | None, ...]) -> jax.Array:
    """[batch, seq, in] x [in, out] -> [batch, seq, out] in x's dtype, laid out as `out_axes` say."""
    if isinstance(w, Operator):
        return w.apply(x, out_axes)
    return contract(x, gather_to_multiply(w, x, x.dtype), "io", out_axes)


def add_bias(x: jax.Array, b: jax.Array) -> jax.Array:
    """X [batch, seq, out] + b [out], in x's dtype."""
    return x + gather(b.astype(x.dtype))


def unembed(x: jax.Array, w: Weight, out_axes: tuple[str | None, ...]) -> jax.Array:
    """[batch, seq, embed] x the transpose of an embedding table [vocab, embed] -> [batch, seq, vocab]."""
    if isinstance(w, Operator):
        return w.apply_transposed(x, out_axes)
    return contract(x, gather_to_multiply(w, x, x.dtype), "oi", out_axes)


def embed_lookup(ids: jax.Array, w: Weight) -> jax.Array:
    """Rows of a table: int32 [batch, seq], [vocab, embed] -> [batch, seq, embed] in the table's dtype.

    Where the table is spread over devices, rows travel and it stays (`weights/lookup.py`).
    """
    if isinstance(w, Operator):
        return w.lookup(ids)
    if any(jax.typeof(w).sharding.spec.partitions):
        return take_rows(ids, w)
    lookup = placed_by_compiler(lambda ids, w: w.at[ids].get(mode="clip"), "batch", "seq", "act_embed")
    return lookup(ids, w)


def expert_linear(x: jax.Array, w: Weight, group_sizes: jax.Array, out_axes: tuple[str | None, ...]) -> jax.Array:
    """Grouped matmul: rows [tokens, in] sorted by expert, [experts, in, out], int32 [experts] -> [tokens, out].

    Rows beyond the sum of the sizes come out as zeros. On a mesh, x [expert parts, row parts, tokens, in] and group_sizes
    [expert parts, row parts, own experts] hold what each device sorted for itself: nothing is exchanged but, where `in` is
    sharded, the sum over its parts.
    """
    if isinstance(w, Operator):
        return w.expert_apply(x, group_sizes, out_axes)
    return expert_contract(x, narrow(w, x.dtype), group_sizes, out_axes)
