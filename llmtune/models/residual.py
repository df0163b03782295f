"""The layout of what runs between blocks, and the way from there into attention and MLP and back.

    x [batch, residual_seq, act_embed]  --norm, within_blocks-->  [batch, seq, act_embed]  --attention or MLP-->  + x

Both are one layout unless a strategy splits `residual_seq`: then norms and residual additions work on a part of the sequence,
an all-gather stands before attention and MLP, and a reduce-scatter behind their output projections, whose result is declared
as RESIDUAL (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
"""

import jax

from llmtune.sharding import spec

RESIDUAL = ("batch", "residual_seq", "act_embed")


def within_blocks(x: jax.Array) -> jax.Array:
    """[batch, seq, hidden] as attention and MLP see it: whole rows."""
    return jax.sharding.reshard(x, spec("batch", "seq", "act_embed"))


def beside_blocks(x: jax.Array) -> jax.Array:
    """[batch, seq, hidden] laid out as RESIDUAL."""
    return jax.sharding.reshard(x, spec(*RESIDUAL))
