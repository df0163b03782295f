"""What an optimizer does to which weight goes by the weight's path, never by its number of dimensions.

layers/0/attention/q/kernel      [L, in, out]      L matrices: the layer axis is a batch axis
layers/0/mlp/experts/up/kernel   [L, E, in, out]   L x E matrices
layers/0/attention_norm/weight   [L, hidden]       L vectors, though two dimensions
layers/0/attention/q/kernel/a    [L, in, rank]     L matrices of an adapter
embed/table, head/kernel         [.., ..]          one matrix each
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from llmtune.weights import path_name

Rates = Callable[[str], float]  # a leaf's path -> its learning rate, in that of all


def batch_axes(path: str) -> int:
    """How many of a leaf's leading axes number whole weights: layers, and experts after them."""
    return path.startswith("layers/") + ("/experts/" in path)


def is_hidden_matrix(path: str, leaf: jax.Array) -> bool:
    """A matrix of a layer, or of an adapter of one: what Muon orthogonalises. Embeddings, heads, vectors and tokens are none."""
    of_matrix = re.search(r"^layers/.*/kernel(/|$)", path) is not None
    return of_matrix and leaf.ndim - batch_axes(path) == 2


def scale_by_path(rates: Rates) -> optax.GradientTransformation:
    """Each leaf's update times the rate of its path (LoRA+: Hayou et al. 2024, arXiv:2402.12354, trains b faster than a)."""

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        rate = rates(path_name(path))
        return update if rate == 1 else update * rate

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def rates_by_rule(rates: Mapping[str, float], paths: Mapping[str, tuple[str, ...]]) -> Rates:
    """A rate for each rule; `paths`: the weights that a rule names. Of several rules that name a weight, all count."""

    def rate(path: str) -> float:
        product = 1.0
        for rule, own in rates.items():
            product *= own if is_within(path, paths[rule]) else 1.0
        return product

    return rate


def decays(mask: str, undecayed: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """A tree -> True where weights decay: `all` of them, as torch does without parameter groups, or `matrices`, all but norms.

    `undecayed`: the paths of weights that do not, whatever the mask says.
    """

    def decay(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        name = path_name(path)
        return not ((mask == "matrices" and "norm" in name) or is_within(name, undecayed))

    return lambda params: jax.tree_util.tree_map_with_path(decay, params)


def is_within(path: str, weights: tuple[str, ...]) -> bool:
    """Whether a leaf is one of these weights, or a field of one."""
    return any(path == weight or path.startswith(f"{weight}/") for weight in weights)
