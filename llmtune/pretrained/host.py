"""One tensor at a time from the devices to the host, dense, as it will be written.

params --> fetch(path, (layer,) or (layer, expert) or ()) --> numpy array; operators multiplied out, shards put together
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoints_convert import hf_weights
from llmtune.weights import dense, is_operator


def fetch_from(weights: Mapping[str, Any]) -> hf_weights.Fetch:
    """(path, layer) -> the dense matrix on the host."""

    def fetch(name: str, place: tuple[int, ...]) -> np.ndarray:
        weight = weights[name]
        if len(place) == 2:
            return _expert(weight, place)
        if place:
            weight = jax.tree.map(lambda leaf: leaf[place[0]], weight)
        return on_host(dense(weight) if is_operator(weight) else weight)

    return fetch


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array. Of one that is spread over several processes each gets the others' parts: all must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _expert(weight: jax.Array, place: tuple[int, ...]) -> np.ndarray:
    """One expert of one layer, put together on the host from the devices' shards: experts may be spread over them."""
    if not weight.is_fully_addressable:
        return on_host(weight[place])
    out = np.empty(weight.shape[len(place) :], weight.dtype)
    for shard in weight.addressable_shards:
        ranges = [part.indices(size) for part, size in zip(shard.index, weight.shape, strict=True)]
        if all(start <= at < stop for at, (start, stop, _) in zip(place, ranges, strict=False)):
            local = tuple(at - start for at, (start, _, _) in zip(place, ranges, strict=False))
            out[shard.index[len(place) :]] = np.asarray(shard.data[local])
    return out
