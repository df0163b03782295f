"""What a step exchanges between devices, in closed form: for search, and where there is no compiler.

    a weight that is gathered      all-gather, forward and again backward; its gradient scattered over the same mesh axes
    a weight that is shared        all-reduce of its gradient over the mesh axes that split the rows and not the weight
    rows of a split matrix         all-reduce of what it gives, forward; of a matrix split by columns: of its gradient, backward
    a split sequence               keys and values passed on from device to device, as far as causality or a window reaches
    experts on an axis             all-reduce of their results; or of each token's rows an all-to-all, there and back, thrice

A gradient that is scattered over more than one side of the torus at once counts as an all-reduce: that is what the TPU compiler
makes of it. Every microbatch pays for its own. What is smaller than a matrix is left out.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmtune.config import Run
from llmtune.kernels.context_attention import reach
from llmtune.kernels.masks import Mask
from llmtune.models.config import ModelConfig
from llmtune.models.traveling_tokens import tokens_travel
from llmtune.planning.abstract import Inputs
from llmtune.planning.collectives import Collective, wire_bytes
from llmtune.sharding import Strategy
from llmtune.transforms import combine, weights_by_path
from llmtune.weights import is_operator

Exchange = tuple[str, tuple[str, ...], float, float]  # kind, mesh axes, bytes of the whole, how often


def estimate_traffic(
    run: Run, config: ModelConfig, inputs: Inputs, mesh: Mesh, strategy: Strategy
) -> tuple[Collective, ...]:
    """The collectives of a step, the same kinds over the same axes added up, the largest on the wire first."""
    found = [*_of_weights(run, inputs, mesh, strategy), *_of_activations(run, config, mesh, strategy)]
    sums: dict[tuple[str, str, int], list[float]] = {}
    for kind, axes, size, count in found:
        axes = tuple(axis for axis in mesh.axis_names if axis in axes and mesh.shape[axis] > 1)
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if ways > 1:
            own = sums.setdefault((kind, "+".join(axes), ways), [0.0, 0.0])
            own[0] += count * run.train.microbatches
            own[1] += size * count * run.train.microbatches
    rows = (
        Collective(kind, axes, ways, round(count), round(size), wire_bytes(kind, round(size), ways))
        for (kind, axes, ways), (count, size) in sums.items()
    )
    return tuple(sorted(rows, key=lambda row: -row.wire))


def _of_weights(run: Run, inputs: Inputs, mesh: Mesh, strategy: Strategy) -> Iterator[Exchange]:
    compute = jnp.dtype(run.train.dtype).itemsize
    rows = _names(strategy.spec("batch")[0])
    trained = {path for path, own in weights_by_path(inputs.weights.trainable).items() if not is_operator(own)}
    for path, weight in weights_by_path(combine(inputs.weights.trainable, inputs.weights.frozen)).items():
        if not path.endswith("kernel"):
            continue
        leaf = max(jax.tree.leaves(weight), key=lambda leaf: leaf.size * leaf.dtype.itemsize)
        layers = leaf.shape[0] if path.startswith("layers/") else 1
        parts = [_names(part) for part in leaf.sharding.spec]
        split = {axis for part in parts for axis in part}
        held = _names(strategy.spec("expert")[0]) if "/experts/" in path else ()
        gathered = [axis for axis in strategy.gather if axis in split and axis not in held]
        width = min(leaf.dtype.itemsize, compute)
        stored = leaf.size / layers * width / math.prod(mesh.shape[axis] for axis in split)
        gradient = stored / width * compute
        for axis in gathered:
            stored *= mesh.shape[axis]
            yield "all-gather", (axis,), stored, 2 * layers
        if path in trained:
            for axis in gathered:
                gradient *= mesh.shape[axis]
                yield "all-reduce" if sides(mesh, axis) > 1 else "reduce-scatter", (axis,), gradient, layers
            own = gradient / math.prod(mesh.shape[axis] for axis in gathered)
            yield "all-reduce", tuple(axis for axis in rows if axis not in split), own, layers


def _of_activations(run: Run, config: ModelConfig, mesh: Mesh, strategy: Strategy) -> Iterator[Exchange]:
    layers, itemsize = config.num_hidden_layers, jnp.dtype(run.train.dtype).itemsize
    split = math.prod(mesh.shape[axis] for axis in _names(strategy.spec("batch")[0]) + _names(strategy.spec("seq")[0]))
    tokens = run.train.batch_size * run.data.sequence_length / run.train.microbatches / split
    hidden = tokens * config.hidden_size * itemsize
    for axis, again in (("act_heads", run.train.remat != "none"), ("act_mlp", False)):
        yield "all-reduce", _names(strategy.spec(axis)[0]), hidden, layers * (2 + again)
    if config.experts is not None:
        over, travel = _names(strategy.spec("expert")[0]), traveling(strategy)
        sent = hidden * config.experts.num_experts_per_tok
        yield ("ragged-all-to-all", over, sent, 6 * layers) if travel else ("all-reduce", over, hidden, 2 * layers)
    keys = 2 * tokens * config.num_key_value_heads * config.head_dim * itemsize
    context = _names(strategy.spec("seq")[0])
    cut = math.prod(mesh.shape[axis] for axis in context)
    for window, count in Counter(map(config.window, range(layers))).items() if cut > 1 else ():
        passed = reach(Mask(window=window), run.data.sequence_length // cut, cut)
        yield "collective-permute", context, passed * keys, count * (3 if run.train.remat != "none" else 2)


def traveling(strategy: Strategy) -> bool:
    """Whether tokens travel to experts (`llmtune.models.traveling_tokens`)."""
    with strategy.active():
        return tokens_travel()


def sides(mesh: Mesh, axis: str) -> int:
    """Along how many sides of the torus the devices of one mesh axis lie; 1 where devices have no coordinates."""
    index = tuple(slice(None) if name == axis else 0 for name in mesh.axis_names)
    places = [getattr(device, "coords", None) for device in mesh.devices[index].reshape(-1)]
    if any(place is None for place in places):
        return 1
    return max(1, sum(len(set(side)) > 1 for side in zip(*places, strict=True)))


def _names(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())
