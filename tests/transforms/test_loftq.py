"""LoftQ beside the pieces that peft's function is made of: bitsandbytes' NF4 and peft's decomposition, on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft.utils import loftq_utils
from peft.utils.loftq_utils import _low_rank_decomposition

from llmtune.errors import LlmtuneConfigError
from llmtune.sharding import REPLICATED, load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.transforms import Toward, adapters, build, chain, loftq, lora, partition, quantize
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


def peft_loftq(monkeypatch, matrix, iterations):
    """peft's own function of [out, in], which asks for a GPU by name, on the CPU."""
    move = torch.Tensor.to

    def to_cpu(tensor, *where, **named):
        named = {key: "cpu" if str(value) == "cuda" else value for key, value in named.items()}
        return move(tensor, *("cpu" if str(own) == "cuda" else own for own in where), **named)

    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    base, a, b = loftq_utils.loftq_init(matrix, 4, RANK, num_iter=iterations)
    return base.numpy(), (b @ a).numpy()


def begun(values, transform, mesh, table, double=True):
    """(the stored matrices' own codes, the adapted weight) of a base that is encoded before anything is alternated."""
    declared = quantize("nf4", double=double).apply(DECLARED, {})
    with jax.set_mesh(mesh), table.active():
        codes = declared["layers"]["0"]["attention"]["q"]["kernel"].encode(jnp.asarray(values))
        own = jax.device_get(codes)
        params = jax.device_put(
            {"layers": {"0": {"attention": {"q": {"kernel": codes}}}}}, shardings(declared, mesh, table)
        )
        made = build(transform, params, materialize(transform.init(declared), jax.random.key(0), mesh, table))
        return own, jax.device_get(made["layers"]["0"]["attention"]["q"]["kernel"])


@pytest.mark.parametrize("iterations", [1, 5])
def test_a_run_alternates_as_peft_does(monkeypatch, iterations):
    """Matrix by matrix: the base and the factors of peft's `loftq_iter`, without double quantisation, as it has it."""
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * 0.02
    toward = Toward(lambda path, place: values[place], iterations)
    mesh = make_mesh({}, jax.devices()[:1])
    stored, weight = begun(
        values, lora(rank=RANK, alpha=8, targets="q_proj", toward=toward), mesh, REPLICATED, double=False
    )
    assert np.array_equal(weight.base.codes, stored.codes) == (iterations == 1)
    gaps = []
    for layer in range(SHAPE[0]):
        base, product = peft_loftq(monkeypatch, torch.tensor(values[layer].T.copy()), iterations)
        ours = weight.scale[layer] * weight.a[layer] @ weight.b[layer]
        own = np.asarray(jax.tree.map(lambda leaf, n=layer: jnp.asarray(leaf[n]), weight.base).decode_one())
        np.testing.assert_allclose(own.T, base, atol=1e-6)
        np.testing.assert_allclose(ours.T, product, atol=1e-6)
        gaps.append(np.linalg.norm(own + ours - values[layer]))
    assert max(gaps) < np.linalg.norm(values[0]) / 10


@pytest.mark.parametrize("strategy", ["one device", pytest.param("fsdp", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_base_encoded_while_it_loads_gets_its_factors(strategy, iterations):
    """The codes of one alternation stay those of the stored matrices; the second layer is not adapted, nor its codes changed."""
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * 0.02
    table = REPLICATED if strategy == "one device" else load_strategy(strategy, configs_directory() / "strategies")
    mesh = make_mesh({}, jax.devices()[:1]) if strategy == "one device" else make_mesh({"fsdp": 8, "tensor": 1})
    toward = Toward(lambda path, place: values[place], iterations)
    transform = lora(rank=RANK, alpha=8, targets="q_proj", layers=[0], toward=toward)
    stored, weight = begun(values, transform, mesh, table)
    product = weight.a @ weight.b * weight.scale[:, None, None]
    assert np.array_equal(weight.base.codes[0], stored.codes[0]) == (iterations == 1)
    np.testing.assert_array_equal(weight.base.codes[1], stored.codes[1])
    np.testing.assert_allclose(product[0].T, theirs(torch.tensor(values[0].T.copy()), iterations)[1], atol=1e-6)
    assert not product[1].any() and weight.a[0].any()


def test_what_is_not_quantised_is_refused():
    transform = lora(rank=RANK, alpha=8, targets="q_proj", toward=Toward(lambda path, place: np.zeros(SHAPE[1:])))
    with pytest.raises(LlmtuneConfigError, match=r"adapt\.initial: loftq makes up for codes, and layers/0"):
        transform.init(DECLARED)


def test_what_is_refused():
    for bad in (lambda: loftq("nf5", rank=4, alpha=8), lambda: loftq("nf4", rank=4, alpha=8, iterations=0)):
        with pytest.raises(LlmtuneConfigError, match="loftq"):
            bad()
    with pytest.raises(LlmtuneConfigError, match="needs the stored matrix"):
        chain(quantize("nf4"), loftq("nf4", rank=4, alpha=8)).init(DECLARED)
