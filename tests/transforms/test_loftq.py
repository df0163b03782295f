"""LoftQ beside the pieces that peft's function is made of: bitsandbytes' NF4 and peft's decomposition, on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition

from llmtune.errors import LlmtuneConfigError
from llmtune.sharding import REPLICATED, load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.transforms import adapters, build, chain, loftq, lora, partition, quantize
from llmtune.weights import ArraySpec, materialize, shardings

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


@pytest.mark.parametrize("strategy", ["one device", pytest.param("fsdp", marks=pytest.mark.nightly)])
def test_a_base_encoded_while_it_loads_gets_the_factors_of_one_alternation(strategy):
    """The codes stay those of the stored matrices; the second layer is not adapted."""
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * 0.02
    table = REPLICATED if strategy == "one device" else load_strategy(strategy, configs_directory() / "strategies")
    mesh = make_mesh({}, jax.devices()[:1]) if strategy == "one device" else make_mesh({"fsdp": 8, "tensor": 1})
    toward = lambda path, place: values[place]  # noqa: E731
    transform = lora(rank=RANK, alpha=8, targets="q_proj", layers=[0], toward=toward)
    declared = quantize("nf4").apply(DECLARED, {})
    with jax.set_mesh(mesh), table.active():
        codes = declared["layers"]["0"]["attention"]["q"]["kernel"].encode(jnp.asarray(values))
        layouts = shardings(declared, mesh, table)
        params = jax.device_put({"layers": {"0": {"attention": {"q": {"kernel": codes}}}}}, layouts)
        made = build(transform, params, materialize(transform.init(declared), jax.random.key(0), mesh, table))
        weight = made["layers"]["0"]["attention"]["q"]["kernel"]
        product = np.asarray(weight.a @ weight.b) * np.asarray(weight.scale)[:, None, None]
        np.testing.assert_array_equal(weight.base.codes, codes.codes)
    np.testing.assert_allclose(product[0].T, theirs(torch.tensor(values[0].T.copy()), 1)[1], atol=1e-6)
    assert not product[1].any() and np.asarray(weight.a[0]).any()


def test_what_is_not_quantised_is_refused():
    transform = lora(rank=RANK, alpha=8, targets="q_proj", toward=lambda path, place: np.zeros(SHAPE[1:]))
    with pytest.raises(LlmtuneConfigError, match=r"adapt\.initial: loftq makes up for codes, and layers/0"):
        transform.init(DECLARED)


def test_what_is_refused():
    for bad in (lambda: loftq("nf5", rank=4, alpha=8), lambda: loftq("nf4", rank=4, alpha=8, iterations=0)):
        with pytest.raises(LlmtuneConfigError, match="loftq"):
            bad()
    with pytest.raises(LlmtuneConfigError, match="needs the stored matrix"):
        chain(quantize("nf4"), loftq("nf4", rank=4, alpha=8)).init(DECLARED)
