"""How layers lie in memory while a model decodes: in their stack, or (on a CPU) each in buffers of its own.

    layers/0/attention/q/kernel [L, in, out]   --apart-->   layers/0/attention/q/kernel [1, in, out], layers/1/..., ...

XLA's CPU back end copies a layer's matrices out of the stack before it multiplies by them. In training that is lost beside the
products; a decoding step reads each matrix for a few tokens only, and the copies would take most of its time. Segments of one
layer have nothing to be copied out of, and each layer's cache becomes a slot of its own. The copy is kept for the next call, for
as long as the weights that it is a copy of live.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from llmtune.generation.cache import Cache, LayerCache, StackedCache
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.weights import map_stacked, split_shared

Bind = Callable[[Any], LanguageModel]


@dataclass(frozen=True)
class Arrangement:
    """How decoding reads a model: weights and cache as prefill leaves them, brought into the form that `bind` takes."""

    bind: Bind
    weights: Callable[[Any], Any]
    cache: Callable[[StackedCache], Cache]


def arrangement(mesh: Mesh) -> Callable[[Bind, ModelConfig], Arrangement]:
    """The arrangement for the platform of a mesh."""
    return apart if mesh.devices.flat[0].platform == "cpu" else stacked


def stacked(bind: Bind, config: ModelConfig) -> Arrangement:
    """As they are."""
    del config
    return Arrangement(bind, lambda params: params, lambda cache: cache)


def apart(bind: Bind, config: ModelConfig) -> Arrangement:
    """Each layer by itself: as many segments, and as many slots of the pattern of windows, as there are layers."""
    count, period = config.num_hidden_layers, len(config.windows)
    written_out = replace(config, windows=tuple(config.window(layer) for layer in range(count)))
    graphdef, _ = declare(written_out, [1] * count)

    def cache_apart(cache: StackedCache) -> LayerCache:
        k, v = (tuple(buffers[n % period][n // period] for n in range(count)) for buffers in (cache.k, cache.v))
        return LayerCache(k, v)

    return Arrangement(
        lambda params: replace(bind(params), graphdef=graphdef), _weights_apart_once, jax.jit(cache_apart)
    )


@jax.jit
def _layers_apart(layers: Any) -> Any:
    """{segment: its layers stacked} -> {layer: a stack of one}."""
    return dict(enumerate(own for _, segment in sorted(layers.items()) for own in _unstacked(segment)))


def _unstacked(segment: Any) -> list[Any]:
    depth = jax.tree.leaves(split_shared(segment)[0])[0].shape[0]
    return [map_stacked(lambda stack, n=n: stack[n : n + 1], segment) for n in range(depth)]


class _Once:
    """A function of a tree of arrays whose last result is kept until one of those arrays is gone."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self.kept: tuple[tuple[int, ...], list[weakref.ref], Any] | None = None

    def __call__(self, tree: Any) -> Any:
        """What the function gives, or gave last time for these very arrays."""
        leaves = jax.tree.leaves(tree)
        names, kept = tuple(map(id, leaves)), self.kept
        if kept is not None and kept[0] == names:
            return kept[2]
        self.kept = kept = None  # before there is another
        result = self.function(tree)
        self.kept = names, [weakref.ref(leaf, self._forget) for leaf in leaves], result
        return result

    def _forget(self, gone: weakref.ref) -> None:
        kept = self.kept
        if kept is not None and any(own is gone for own in kept[1]):
            self.kept = None


_layers_apart_once = _Once(_layers_apart)


def _weights_apart_once(params: Any) -> Any:
    return {**params, "layers": _layers_apart_once(params["layers"])}
