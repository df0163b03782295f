"""Microbatches of unequal token counts, one of them empty, give the gradient of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.training.step import accumulate
from llmtune.weights import materialize

ROWS, SEQ = 8, 24


def ragged(rng):
    """Rows of 0 to 20 targets; rows 3 and 7, which are a microbatch of four and two of eight, have none."""
    tokens = rng.integers(0, 53, (ROWS, SEQ)).astype(np.int32)
    labels = tokens.copy()
    for row in range(ROWS):
        labels[row, : 4 + 2 * row] = -100
    labels[[3, 7]] = -100
    return tokens, labels


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_microbatches_add_up_to_the_gradient_of_the_whole(pieces):
    graphdef, declared = declare(ModelConfig("LlamaForCausalLM", 53, 16, 32, 2, 2, 1, 8))
    mesh = make_mesh({}, jax.devices()[:1])
    weights = materialize(declared, jax.random.key(0), mesh, REPLICATED)
    tokens, labels = ragged(np.random.default_rng(0))
    batch = {"tokens": tokens, "labels": labels, "segment_ids": np.ones_like(tokens)}
    batch["positions"] = np.broadcast_to(np.arange(SEQ, dtype=np.int32), tokens.shape)
    bind = functools.partial(LanguageModel, graphdef, head_chunk=8)

    def sums(trainable, frozen, key, batch):
        del frozen, key
        loss, weight, figures = next_token_loss(bind(trainable), batch)
        return loss, (weight, figures)

    def mean(pieces):
        with jax.set_mesh(mesh):
            gradient = jax.value_and_grad(sums, has_aux=True)
            (loss, (weight, _)), grads = jax.jit(functools.partial(accumulate, gradient, pieces))(
                weights, None, jax.random.key(0), jax.tree.map(jnp.asarray, batch)
            )
        return float(weight), [np.float64(own) / float(weight) for own in (loss, *jax.tree.leaves(grads))]

    number, whole = mean(1)
    count, parts = mean(pieces)
    assert number == count == float((labels[:, 1:] != -100).sum())
    norm = np.sqrt(sum(np.square(own).sum() for own in whole[1:]))
    apart = np.sqrt(sum(np.square(own - other).sum() for own, other in zip(whole[1:], parts[1:], strict=True)))
    assert apart / norm < 1e-6 and parts[0] == pytest.approx(whole[0], rel=1e-6)
