"""How much of its chips a step uses: the model's FLOPs in closed form, over the time it took and the published peak (MFU).

Counted are matrix products and attention: forward, the gradient of activations, and the gradient of the weights that train.

    a matrix that trains   6 per weight and token       a frozen one   4
    attention              12 * width per pair of tokens, of the pairs that causality, windows and documents leave

Padding, what is computed again to save memory, norms, softmax and the optimizer do not count: MFU is about the model, not about
the program (the definition of PaLM, arXiv:2204.02311, appendix B, which counts all pairs of a row; here only those that count).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.chips import chip_of
from llmtune.inspection import count_parameters, matmul_flops
from llmtune.models.config import ModelConfig
from llmtune.objectives.record import Batch
from llmtune.weights import path_name

PAIRS = "attended_pairs"  # the name of its metric


@dataclass(frozen=True)
class Work:
    """FLOPs of training: `per_token` of matrices, `per_pair` of attention in one layer; `peak` FLOP/s of all devices or None."""

    per_token: float
    per_pair: float
    peak: float | None
    devices: int

    def flops(self, tokens: float, pairs: float) -> float:
        """Of a step over so many tokens and pairs, the pairs summed over layers."""
        return self.per_token * tokens + self.per_pair * pairs


def model_work(config: ModelConfig, trainable: Any, devices: Any, *, adapted: bool) -> Work:
    """The work of a run whose tree of trained weights (or of their shapes) is given, on these jax devices.

    `adapted`: what trains stands beside the matrices, which are frozen but for those that train in whole.
    """
    counts = count_parameters(config)
    sizes = {path_name(path): math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}
    own = {path: size for path, size in counts.items() if path in sizes}
    per_token = 2.0 * matmul_flops(config, counts) + _matmuls(config, own)
    if adapted:
        added = {f"{path}/kernel": size for path, size in sizes.items() if path not in own}
        per_token += 3 * _matmuls(config, added)
    chip, devices = chip_of(devices.flat[0]), devices.size
    width = config.num_attention_heads * config.head_dim
    return Work(per_token, 12.0 * width, None if chip is None else chip.flops * devices, devices)


def _matmuls(config: ModelConfig, counts: dict[str, int]) -> float:
    """Forward FLOPs per token of some matrices; a tied table counts only where it is among them."""
    return matmul_flops(config, {"embed/table": 0, **counts})


def with_pairs(step: Callable, config: ModelConfig) -> Callable:
    """The train step, its metrics with the number of (query, key) pairs of the batch, summed over layers: float32 []."""

    @functools.wraps(step)  # programs are named after it, in logs and profiles
    def counted(state: Any, frozen: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        state, metrics = step(state, frozen, batch)
        return state, {**metrics, PAIRS: attended_pairs(config, batch)}

    return counted


def attended_pairs(config: ModelConfig, batch: Batch) -> jax.Array:
    """Of every token, the keys that it sees (those of its document up to itself, at most a window), over all layers."""
    seen = jnp.where(batch["segment_ids"] > 0, batch["positions"] + 1, 0).astype(jnp.float32)
    layers = [config.window(layer) for layer in range(config.num_hidden_layers)]
    total = jnp.zeros((), jnp.float32)
    for window in dict.fromkeys(layers):
        total += layers.count(window) * (seen if window is None else jnp.minimum(seen, window)).sum()
    return total
