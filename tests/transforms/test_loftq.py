"""LoftQ beside the pieces that peft's function is made of: bitsandbytes' NF4 and peft's decomposition, on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition

from llmtune.errors import LlmtuneConfigError
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.transforms import adapters, build, chain, loftq, partition, quantize
from llmtune.weights import ArraySpec, materialize

bnb = pytest.importorskip("bitsandbytes.functional")
RANK, SHAPE = 4, (2, 128, 96)
DECLARED = {"layers": {"0": {"attention": {"q": {"kernel": ArraySpec(SHAPE, ("layers", "embed", "heads"))}}}}}


def theirs(matrix, iterations):
    """peft's loop, whose devices are GPUs: (base, product of the factors) of [out, in]."""
    rest = matrix.clone()
    for left in reversed(range(iterations)):
        packed, state = bnb.quantize_4bit(rest, blocksize=64, compress_statistics=True, quant_type="nf4")
        base = bnb.dequantize_4bit(packed, state)
        found = _low_rank_decomposition(matrix - base, RANK)
        rest = matrix - found["L"] @ found["R"] if left else rest
    return base.numpy(), (found["L"] @ found["R"]).numpy()


@pytest.mark.parametrize("iterations", [1, 3])
def test_base_and_factors_are_theirs_layer_by_layer(iterations):
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * 0.02
    transform = loftq("nf4", rank=RANK, alpha=8, iterations=iterations)
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh), REPLICATED.active():
        params = jax.tree.map(lambda _: jnp.asarray(values), DECLARED, is_leaf=lambda leaf: isinstance(leaf, ArraySpec))
        drawn = materialize(transform.init(DECLARED), jax.random.key(0), mesh, REPLICATED)
        made = build(transform, params, drawn)
        weight = made["layers"]["0"]["attention"]["q"]["kernel"]
        dense, base = np.asarray(weight.dense()), np.asarray(weight.base.dense())
    assert jax.tree.structure(made) == jax.tree.structure(transform.apply(DECLARED, transform.init(DECLARED)))
    for layer in range(SHAPE[0]):
        expected, product = theirs(torch.tensor(values[layer].T.copy()), iterations)
        np.testing.assert_allclose(base[layer].T, expected, atol=1e-6)
        np.testing.assert_allclose((dense - base)[layer].T, product, atol=1e-6)
        assert np.linalg.norm(dense[layer] - values[layer]) < np.linalg.norm(expected.T - values[layer])
    assert len(jax.tree.leaves(partition(made, adapters)[0])) == 2


def test_what_is_refused():
    for bad in (lambda: loftq("nf5", rank=4, alpha=8), lambda: loftq("nf4", rank=4, alpha=8, iterations=0)):
        with pytest.raises(LlmtuneConfigError, match="loftq"):
            bad()
    with pytest.raises(LlmtuneConfigError, match="needs the stored matrix"):
        chain(quantize("nf4"), loftq("nf4", rank=4, alpha=8)).init(DECLARED)
