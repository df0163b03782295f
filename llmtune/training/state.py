"""What a training run carries from step to step, and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`step` int32 []: batches seen so far; `trainable`: the weights that train (None elsewhere); the optimizer's state.

    What else a run asks for is None, and takes nothing, where it does not: `loss_scale` (`training/loss_scale.py`), `recent`
    losses and gradient norms (`training/guard.py`), the `average` of the weights, and the `start` from which they came
    (`training/average.py`).
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    loss_scale: Any = None
    recent: Any = None
    average: Any = None
    start: Any = None


Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Revision:
    """What a run may add to its steps: to the first state, and to what a step proposes.

    `begin`: state -> state; `revise`: (state before, state proposed, metrics) -> (state after, metrics), within the jitted step.
    """

    begin: Callable[[TrainState], TrainState]
    revise: Callable[[TrainState, TrainState, Metrics], tuple[TrainState, Metrics]]


def first_state(
    trainable: Any, optimizer: optax.GradientTransformation, revisions: Sequence[Revision] = ()
) -> TrainState:
    """Step zero, to be traced. Optimizer moments inherit the sharding of the weights they belong to."""
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    for revision in revisions:
        state = revision.begin(state)
    return state


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, revisions: Sequence[Revision] = ()
) -> TrainState:
    """Step zero, in arrays; the weights are those given, not copies."""

    def rest(weights: Any) -> dict[str, Any]:
        state = first_state(weights, optimizer, revisions)
        return {name: own for name, own in vars(state).items() if name != "trainable"}

    return TrainState(trainable=trainable, **jax.jit(rest)(trainable))
