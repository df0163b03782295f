"""What a training run carries from step to step, and nothing else."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`step` int32 []: updates done so far; `trainable`: the weights that train (None elsewhere); the optimizer's state."""

    step: jax.Array
    trainable: Any
    opt_state: Any


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Step zero. Optimizer moments inherit the sharding of the weights they belong to."""
    step, opt_state = jax.jit(lambda weights: (jnp.zeros((), jnp.int32), optimizer.init(weights)))(trainable)
    return TrainState(step, trainable, opt_state)
