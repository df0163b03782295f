"""The optimizer's state in the host's memory between updates (as in ZeRO-Offload: Ren et al. 2021, arXiv:2101.06840).

    gradients -> moments of one weight come to the device -> its update -> they go back -> those of the next weight come -> ...

A weight is a stack of all layers: a device holds the moments of one matrix of each layer at a time, and only while nothing of
the forward and backward pass is there. Once a step, whatever the microbatches. Scalars stay where they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from llmtune.training.state import Metrics, Revision, TrainState

KIND = "pinned_host"  # the memory's name in shardings
Propose = Callable[[Any], tuple[TrainState, Metrics]]  # the optimizer's state, on the devices -> the state after a step
Path = tuple[Any, ...]


def waits(leaf: Any) -> bool:
    """Whether a leaf of the optimizer's state is one that goes to the host: all but scalars."""
    return leaf.ndim > 0


def begin_on_host() -> Revision:
    """The first state, its moments on the host."""

    def begin(state: TrainState) -> TrainState:
        return replace(state, opt_state=jax.tree.map(_go, state.opt_state))

    return Revision(begin, lambda state, proposed, metrics: (proposed, metrics))


def weight_by_weight(propose: Propose, opt_state: Any, gradients: Any) -> tuple[TrainState, Metrics]:
    """`propose` once for each weight, of which what belongs to that weight is taken; the compiler drops all else.

    The moments of a weight come when those of the one before have gone, of the first when all gradients are there.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(gradients)]
    owners = [_owner(path, paths) for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]
    waiting, structure = jax.tree.flatten(opt_state)
    before, proposals, left = gradients, [], list(waiting)
    for path in paths:
        own = [owner == path or (owner is None and not proposals) for owner in owners]
        here = [_come(leaf, before if mine else ()) for leaf, mine in zip(waiting, own, strict=True)]
        proposals.append(propose(jax.tree.unflatten(structure, here)))
        updated = jax.tree.leaves(proposals[-1][0].opt_state)
        left = [_go(new) if mine else old for new, old, mine in zip(updated, left, own, strict=True)]
        before = [leaf for leaf, mine in zip(left, own, strict=True) if mine]
    (first, metrics), states = proposals[0], [state for state, _ in proposals]
    parts = {name: _each_own([vars(state)[name] for state in states]) for name in ("trainable", "average")}
    return replace(first, opt_state=jax.tree.unflatten(structure, left), **parts), metrics


def _owner(path: Path, weights: Sequence[Path]) -> Path | None:
    """The weight whose path is a part of this one: that of its moment, or of a piece of it."""
    places = range(len(path))
    return next((own for own in weights if any(path[at : at + len(own)] == own for at in places)), None)


def _each_own(trees: Sequence[Any]) -> Any:
    """Of the n-th tree its n-th leaf."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), [own[n] for n, own in enumerate(leaves[: len(leaves[0])])])


def _come(leaf: jax.Array, after: Any) -> jax.Array:
    if not waits(leaf):
        return leaf
    leaf, _ = jax.lax.optimization_barrier((leaf, after))
    return jax.device_put(leaf, jax.memory.Space.Device)


def _go(leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, jax.memory.Space.Host) if waits(leaf) else leaf
