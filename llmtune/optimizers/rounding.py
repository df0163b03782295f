"""Weights kept in bfloat16 between steps, each rounded up or down by chance, so that on average nothing is lost.

    float32(weights) + updates   + 16 random bits below bfloat16's last, then cut off   -->  bfloat16

A bfloat16 has 8 bits: an update below 1 / 512 of its weight is lost in rounding to the nearest, in every step anew. Rounded up
with the probability of what is cut off, the mean of the result is the sum (Gupta et al. 2015, arXiv:1502.02551, section 3.1).
The bits follow from (seed, number of the update, path of the weight): a run that is taken up again draws the same, on any mesh.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmtune.optimizers.choose import updates_done
from llmtune.optimizers.placement import layout_of
from llmtune.weights import path_name

CUT = 16  # bits by which float32 is the longer one


def rounded_by_chance(optimizer: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """The optimizer over bfloat16 weights: it sees them, and keeps its state, in float32; other dtypes pass as they are.

    Its updates lead from each weight to a bfloat16 number, so that `optax.apply_updates` has nothing left to round. Gradients
    are to be float32.
    """

    def init(params: Any) -> Any:
        return optimizer.init(widened(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.key(seed), updates_done(state))
        wide = widened(params)
        updates, state = optimizer.update(updates, state, wide, **extra)

        def rounded(path: tuple[Any, ...], own: jax.Array, weight: jax.Array, kept: jax.Array) -> jax.Array:
            if kept.dtype != jnp.bfloat16:
                return own
            leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
            return round_by_chance(weight + own, leaf_key).astype(jnp.float32) - weight

        return jax.tree_util.tree_map_with_path(rounded, updates, wide, params), state

    return optax.GradientTransformation(init, update)


def round_by_chance(values: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: one of both neighbours, so that the mean is the number. What is not finite stays."""
    layout = None if jax.sharding.get_abstract_mesh().empty else layout_of(values)
    chance = jax.random.bits(key, values.shape, jnp.uint16, out_sharding=layout).astype(jnp.uint32)
    raised = jax.lax.bitcast_convert_type(values, jnp.uint32) + chance
    cut = jax.lax.bitcast_convert_type(raised >> CUT << CUT, jnp.float32)
    return jnp.where(jnp.isfinite(values), cut, values).astype(jnp.bfloat16)


def widened(tree: Any) -> Any:
    """Floating leaves in float32; those that are, as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
