"""Weights, written: a merged Hugging Face directory, matrix by matrix as it is put together on the host.

save(path, params, source)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints_convert import companions, hf_weights
from checkpoints_convert.stacks import depths, placed
from llmtune.errors import LlmtuneConfigError
from llmtune.pretrained.source import Progress, Source, weights_of
from llmtune.sharding import make_mesh
from llmtune.transforms import EMBEDDING, HEAD, refuse_without_dense, weights_by_path
from llmtune.weights import dense, has_codes, is_operator, layer, map_stacked, on_another_base


def save(
    path: Path,
    params: Any,
    source: Source,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    base: hf_weights.Fetch | None = None,
    complete: Callable[[Path], None] = lambda directory: None,
    progress: Progress = lambda done: None,
) -> None:
    """A merged Hugging Face directory; config, notices and tokenizer (`tokenizer`: another's directory) beside the weights.

    Each tensor in `dtype`, or, where that is None, in its dtype on disk (for a preset: in the dtype that it names).
    `base`: where the matrices come from that adapters on quantised bases are merged into (`stored_matrices`); None: what the
    codes decode to. `complete` puts into the directory what else belongs there, before it appears. What cannot be merged
    is refused.
    """
    refuse_without_dense(params)

    def finish(directory: Path) -> None:
        if tokenizer is not None:
            companions.replace_tokenizer(tokenizer, directory)
        complete(directory)

    hf_weights.save_directory(
        path,
        fetch_from(weights_by_path(params), base),
        source.config,
        source.hf_config,
        source.directory,
        source.companions,
        dtype=dtype,
        stored_dtype=source.hf_config.get("dtype") or source.hf_config.get("torch_dtype") or "float32",
        complete=finish,
        progress=progress,
    )


def fetch_from(weights: Mapping[str, Any], base: hf_weights.Fetch | None = None) -> hf_weights.Fetch:
    """(path, place in a stack of all layers) -> the dense matrix on the host; for `base` see `save`."""
    cut = depths(weights)

    def fetch(path: str, index: tuple[int, ...]) -> np.ndarray:
        name, place = placed(path, index, cut)
        weight = weights[name]
        if len(place) == 2:
            weight = map_stacked(lambda leaf: _expert(leaf, place), weight)
        elif place:
            weight = layer(weight, place[0])
        if base is not None and has_codes(weight):
            weight = on_another_base(jax.tree.map(on_host, weight), base(path, index))
        return on_host(dense(weight) if is_operator(weight) else weight)

    return fetch


def stored_matrices(source: Source) -> hf_weights.Fetch:
    """The matrices as they lie in the source's files, one at a time."""
    if source.directory is None:
        raise LlmtuneConfigError(
            f"{source.name}: a preset has no stored weights to merge into; merge into the dequantised"
        )
    if not source.untied:
        return hf_weights.stored_matrices(weights_of(source, source.config), source.config)
    tied = replace(source.config, tie_word_embeddings=True)
    fetch = hf_weights.stored_matrices(weights_of(source, tied), tied)
    return lambda path, place: fetch(EMBEDDING, place).T if path == HEAD else fetch(path, place)


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array. Of one that is spread over several processes each gets the others' parts: all must ask for it."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _expert(weight: jax.Array, place: tuple[int, ...]) -> np.ndarray:
    """One expert of one layer, put together on the host from the devices' shards: experts may be spread over them."""
    if not weight.is_fully_addressable:  # its process sends it to the others; within it, it stays spread
        mesh, rest = weight.sharding.mesh, PartitionSpec(*weight.sharding.spec[len(place) :])  # type: ignore[attr-defined]
        with jax.set_mesh(mesh):
            return on_host(weight.at[place].get(out_sharding=NamedSharding(mesh, rest)))
    out = np.empty(weight.shape[len(place) :], weight.dtype)
    for shard in weight.addressable_shards:
        ranges = [part.indices(size) for part, size in zip(shard.index, weight.shape, strict=True)]
        if all(start <= at < stop for at, (start, stop, _) in zip(place, ranges, strict=False)):
            local = tuple(at - start for at, (start, _, _) in zip(place, ranges, strict=False))
            with jax.set_mesh(
                make_mesh({}, [shard.device])
            ):  # the slice is of this device alone, whatever mesh we are under
                out[shard.index[len(place) :]] = np.asarray(shard.data[local])
    return out


def copy_notices(source: Source, directory: Path) -> None:
    """The base's licence, notices and use policy, without which nothing that is derived from it may be passed on."""
    if source.directory is not None:
        companions.copy_companions(source.directory, directory, companions.NOTICES)
