"""Dropout of an adapter's input. Its key is a field of the operator: the train step fills it in anew for every step.

    LoRA(base, a, b, scale, key=None, dropout=0.1)  --with_dropout_keys(params, key)-->  LoRA(..., key=[L] keys, dropout=0.1)

Without a key nothing is dropped, which is how a model is evaluated, sampled from and merged. Keys are derived from the path
of a weight and the number of its layer: the same (seed, step) drops the same elements on any mesh.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.sharding import ShardingError, on_own_part
from llmtune.weights.operator import is_operator
from llmtune.weights.spec import path_name


def drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Each element is zero with probability `rate`, else x / (1 - rate); without a key, x as it is."""
    if key is None or rate == 0:
        return x
    if not jax.sharding.get_abstract_mesh().empty and on_own_part():
        raise ShardingError(
            "adapt.dropout: what is dropped of rows that travel to experts would depend on the mesh; leave it 0, adapt no "
            "experts, or take a strategy under which tokens stay, such as fsdp_torus"
        )
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def with_dropout_keys(params: Any, key: jax.Array) -> Any:
    """The same tree, every operator that drops with a key of its own, [L] keys where it is a stack of layers."""

    def fill(path: tuple[Any, ...], weight: Any) -> Any:
        if not is_operator(weight):
            return weight
        return weight.with_key(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())))

    return jax.tree_util.tree_map_with_path(fill, params, is_leaf=is_operator)
