"""Choosing the next token from its logits: greedy, or drawn after temperature, top-k and top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llmtune.errors import LlmtuneConfigError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k None or 0 keeps all; top_p None or 1 keeps all."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise LlmtuneConfigError(f"temperature: {self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 0:
            raise LlmtuneConfigError(f"top_k: {self.top_k} must be a positive number of tokens, or 0 for all")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise LlmtuneConfigError(f"top_p: {self.top_p} must lie in (0, 1]")


def greedy(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The most likely token: float32 [batch, vocab] -> int32 [batch]."""
    del keys, sampling
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)  # two plain reductions: faster than argmax on a CPU
    best = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(best, ids, logits.shape[-1] - 1).min(axis=-1)


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """A random token of each row, with that row's own key: rows do not depend on what else is in the batch."""
    scaled = logits / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(scaled, min(sampling.top_k, scaled.shape[-1]))[0][:, -1:]
        scaled = jnp.where(scaled < kth, -jnp.inf, scaled)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        scaled = jnp.where(_outside_nucleus(scaled, sampling.top_p), -jnp.inf, scaled)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def _outside_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Tokens beyond the smallest set whose probability reaches top_p (Holtzman et al. 2020, arXiv:1904.09751)."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.take_along_axis(before >= top_p, jnp.argsort(order, axis=-1), axis=-1)
