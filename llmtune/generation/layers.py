"""How layers lie in memory while a model decodes: in their stack, or (on a CPU) each in buffers of its own.

    layers/0/attention/q/kernel [L, in, out]   --apart-->   layers/0/attention/q/kernel [1, in, out], layers/1/..., ...

XLA's CPU back end copies a layer's matrices out of the stack before it multiplies by them. In training that is lost beside the
products; a decoding step reads each matrix for a few tokens only, and the copies would take most of its time. Segments of one
layer have nothing to be copied out of, and each layer's cache becomes a slot of its own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from llmtune.generation.cache import Cache, LayerCache, StackedCache
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.weights import map_stacked, split_shared

Bind = Callable[[Any], LanguageModel]
Arrange = Callable[
    [Any, StackedCache], tuple[Any, Cache]
]  # (params, cache) as prefill leaves them -> as decoding reads them


def arrangement(mesh: Mesh) -> Callable[[Bind, ModelConfig], tuple[Bind, Arrange]]:
    """The arrangement for the platform of a mesh: `bind` for it, and the function that brings weights and cache into it."""
    return apart if mesh.devices.flat[0].platform == "cpu" else stacked


def stacked(bind: Bind, config: ModelConfig) -> tuple[Bind, Arrange]:
    """As they are."""
    del config
    return bind, lambda params, cache: (params, cache)


def apart(bind: Bind, config: ModelConfig) -> tuple[Bind, Arrange]:
    """Each layer by itself: as many segments, and as many slots of the pattern of windows, as there are layers."""
    count, period = config.num_hidden_layers, len(config.windows)
    written_out = replace(config, windows=tuple(config.window(layer) for layer in range(count)))
    graphdef, _ = declare(written_out, [1] * count)

    def take_apart(params: Any, cache: StackedCache) -> tuple[Any, LayerCache]:
        layers = [own for _, segment in sorted(params["layers"].items()) for own in _layers(segment)]
        k, v = (tuple(buffers[n % period][n // period] for n in range(count)) for buffers in (cache.k, cache.v))
        return {**params, "layers": dict(enumerate(layers))}, LayerCache(k, v)

    return lambda params: replace(bind(params), graphdef=graphdef), jax.jit(take_apart)


def _layers(segment: Any) -> list[Any]:
    depth = jax.tree.leaves(split_shared(segment)[0])[0].shape[0]
    return [map_stacked(lambda stack, n=n: stack[n : n + 1], segment) for n in range(depth)]
