"""How layers lie in memory while a model decodes: in their stack, or (on a CPU) each in buffers of its own.

    layers/0/attention/q/kernel [L, in, out]   --apart-->   layers/0/attention/q/kernel [1, in, out], layers/1/..., ...

XLA's CPU back end copies a layer's matrices out of the stack before it multiplies by them. In training that is lost beside the
products; a decoding step reads each matrix for a few tokens only, and the copies would take most of its time. Segments of one
layer have nothing to be copied out of, and each layer's cache becomes a slot of its own. A model that generates keeps the copy
for its next call, as long as its weights live; training, which samples now and then and has other weights by then, does not.
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


Arrange = Callable[[Bind, ModelConfig], Arrangement]


def for_one_call(mesh: Mesh) -> Arrange:
    """The arrangement for the platform of a mesh, made anew in each call."""
    return apart if mesh.devices.flat[0].platform == "cpu" else stacked


def for_many_calls(mesh: Mesh) -> Arrange:
    """The same, its copy of the weights kept for the next call."""
    return kept_apart if mesh.devices.flat[0].platform == "cpu" else stacked


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

    def weights_apart(params: Any) -> Any:
        return {**params, "layers": _layers_apart(params["layers"])}

    return Arrangement(lambda params: replace(bind(params), graphdef=graphdef), weights_apart, jax.jit(cache_apart))


def kept_apart(bind: Bind, config: ModelConfig) -> Arrangement:
    """The same; the layers' copy is the last one where it is of these weights."""

    def weights_apart(params: Any) -> Any:
        return {**params, "layers": _kept_layers_apart(params["layers"])}

    return replace(apart(bind, config), weights=weights_apart)


@jax.jit
def _layers_apart(layers: Any) -> Any:
    """{segment: its layers stacked} -> {layer: a stack of one}."""
    return dict(enumerate(own for _, segment in sorted(layers.items()) for own in _unstacked(segment)))


def _unstacked(segment: Any) -> list[Any]:
    depth = jax.tree.leaves(split_shared(segment)[0])[0].shape[0]
    return [map_stacked(lambda stack, n=n: stack[n : n + 1], segment) for n in range(depth)]


class _Kept:
    """A function of a tree of arrays whose last result is kept until one of those arrays is gone."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self.last: tuple[Any, list[weakref.ref], Any] | None = None  # what it was of, its arrays, the result

    def __call__(self, tree: Any) -> Any:
        """What the function gives, or gave last time for these very arrays."""
        arrays, structure = jax.tree.flatten(tree)
        of, last = (structure, tuple(map(id, arrays))), self.last
        if last is not None and last[0] == of:
            return last[2]
        self.last = last = None  # before there is another
        result = self.function(tree)
        if all(isinstance(own, jax.Array) for own in arrays):  # others may change in place
            self.last = of, [weakref.ref(own, self._forget) for own in arrays], result
        return result

    def _forget(self, gone: weakref.ref) -> None:
        last = self.last
        if last is not None and any(own is gone for own in last[1]):
            self.last = None


_kept_layers_apart = _Kept(_layers_apart)
