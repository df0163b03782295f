"""Greedy, top-k and nucleus sampling: which tokens may be drawn, and how often, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.errors import LlmtuneConfigError
from llmtune.generation.sampling import Sampling, draw, greedy

VOCAB, DRAWS = 50, 40_000
LOGITS = np.random.default_rng(0).normal(size=VOCAB) * 2


def reference(logits, sampling):
    """Probabilities after temperature, then top-k, then the smallest set that reaches top_p."""
    p = np.exp(logits / sampling.temperature - np.max(logits / sampling.temperature))
    p /= p.sum()
    if sampling.top_k:
        p = np.where(p >= np.sort(p)[-min(sampling.top_k, len(p))], p, 0.0)
        p /= p.sum()
    if sampling.top_p is not None:
        order = np.argsort(-p)
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0.0)
        p /= p.sum()
    return p


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0), Sampling(0.4), Sampling(2.0), Sampling(1.0, top_k=1), Sampling(1.3, top_k=7), Sampling(1.0, top_k=0),
        Sampling(1.0, top_k=1000), Sampling(1.0, top_p=0.3), Sampling(0.8, top_p=0.9), Sampling(1.0, top_p=1.0),
        Sampling(1.0, top_p=1e-9), Sampling(1.5, top_k=12, top_p=0.8),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_are_drawn_as_often_as_they_should_be(sampling):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(DRAWS))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (DRAWS, VOCAB))
    drawn = np.asarray(jax.jit(draw, static_argnums=2)(logits, keys, sampling))
    expected = reference(LOGITS, sampling)
    seen = np.bincount(drawn, minlength=VOCAB) / DRAWS
    assert not seen[expected == 0].any()
    np.testing.assert_allclose(seen, expected, atol=5 * np.sqrt(0.25 / DRAWS))
    assert (seen[expected > 0.002] > 0).all()


def test_rows_are_drawn_by_their_own_keys():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(6))
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, VOCAB)), jnp.float32)
    whole = np.asarray(draw(logits, keys, Sampling(1.0)))
    order = np.array([4, 0, 5])
    assert (np.asarray(draw(logits[order], keys[order], Sampling(1.0))) == whole[order]).all()


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.array([[0.0, 3.0, 3.0], [-1.0, -2.0, -jnp.inf]])
    assert greedy(logits, None, Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"temperature": -0.1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"), ({"top_p": float("nan")}, "top_p"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings, names):
    with pytest.raises(LlmtuneConfigError, match=names):
        Sampling(**settings)
