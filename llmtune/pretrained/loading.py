"""The weights of a source on the devices: tensor by tensor, straight into shardings.

Source --> params: nested dict of arrays; embedding and head brought to the size of the run's vocabulary where it differs
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from checkpoints_convert import hf_weights
from checkpoints_convert.safetensors_reader import Weights
from llmtune.models.config import ModelConfig
from llmtune.pretrained.source import Source
from llmtune.sharding import Strategy
from llmtune.transforms import resize_vocabulary, without_vocabulary_axis
from llmtune.weights import materialize, shardings

Progress = Callable[[int], None]  # called with the bytes that were read or written since the last call


def load(
    source: Source,
    declared: Any,
    mesh: Mesh,
    strategy: Strategy,
    *,
    dtype: str | None = "float32",
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> Any:
    """The weights of a source, in `dtype` (None: as stored), each device holding its shard. Presets draw from `seed`."""
    if source.directory is None:
        params = materialize(declared, jax.random.key(seed), mesh, strategy)
        return params if dtype in (None, "float32") else jax.tree.map(lambda x: x.astype(dtype), params)
    layouts = shardings(declared, mesh, strategy)
    if source.resize is None:
        return hf_weights.load_params(
            _weights(source, source.config), source.config, layouts, dtype=dtype, progress=progress
        )
    stored = replace(source.config, vocab_size=source.resize.stored)
    back = resize_vocabulary(tokens=0, size=source.resize.stored).apply(declared, {})
    layouts = shardings(without_vocabulary_axis(back), mesh, strategy)
    params = hf_weights.load_params(_weights(source, stored), stored, layouts, dtype=dtype, progress=progress)
    return _resized(params, back, source, mesh, strategy, seed)


def _weights(source: Source, config: ModelConfig) -> Weights:
    assert source.directory is not None
    return source.opened or hf_weights.open_weights(source.directory, config)


def _resized(params: Any, declared: Any, source: Source, mesh: Mesh, strategy: Strategy, seed: int) -> Any:
    """The embedding and the head brought to the source's size, and laid out for it; all else as it is."""
    assert source.resize is not None
    transform = resize_vocabulary(tokens=source.resize.kept, size=source.config.vocab_size)
    noise = materialize(transform.init(declared), jax.random.key(seed), mesh, strategy)

    @jax.jit
    def resize(ends: Any, noise: Any) -> Any:
        with strategy.active():
            return transform.apply(ends, noise)

    return {**params, **resize({end: params[end] for end in ("embed", "head")}, noise)}
