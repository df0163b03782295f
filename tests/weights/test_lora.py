"""LoRA as an operator: what it computes, what it stands for, what of it trains."""

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.sharding import REPLICATED, make_mesh
from llmtune.transforms import adapters, combine, everything, merge, partition
from llmtune.weights import LoRA, linear


def example(layers=None, rank=4):
    rng = np.random.default_rng(0)
    lead = () if layers is None else (layers,)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(lead + shape), jnp.float32)  # noqa: E731
    return LoRA(draw(24, 16), draw(24, rank), draw(rank, 16), jnp.full(lead, 0.5))


def test_apply_equals_the_dense_matrix():
    weight, x = example(), np.random.default_rng(1).standard_normal((2, 3, 24)).astype(np.float32)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])), REPLICATED.active():
        out = linear(jnp.asarray(x), weight, ("batch", "seq", "act_mlp"))
    np.testing.assert_allclose(out, x @ np.asarray(weight.dense(), np.float64), atol=1e-5)


def test_padding_ranks_with_zeros_changes_nothing_and_gets_no_gradient():
    weight, x = example(), jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 24)), jnp.float32)
    padded = LoRA(weight.base, jnp.pad(weight.a, ((0, 0), (0, 2))), jnp.pad(weight.b, ((0, 2), (0, 0))), weight.scale)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])), REPLICATED.active():
        out, out_padded = (linear(x, w, ("batch", "seq", "act_mlp")) for w in (weight, padded))
        gradient = jax.grad(lambda w: jnp.square(linear(x, w, ("batch", "seq", "act_mlp"))).sum())(padded)
    np.testing.assert_allclose(out, out_padded, atol=1e-5)
    assert not np.any(gradient.a[:, 4:]) and not np.any(gradient.b[4:])


def test_only_the_factors_train_and_partition_is_undone_by_combine():
    params = {"q": example(layers=3), "norm": jnp.ones(4), "slot": None}
    trainable, frozen = partition(params, adapters)
    assert trainable["norm"] is None and trainable["q"].base is None and trainable["q"].scale is None
    assert frozen["q"].a is None and frozen["q"].b is None
    jax.tree.map(np.testing.assert_array_equal, combine(trainable, frozen), params)
    full, rest = partition({"w": jnp.ones(3)}, everything)
    assert rest == {"w": None} and full["w"].shape == (3,)


def test_merge_of_stacked_layers_is_exact():
    weight = example(layers=3)
    merged = merge({"q": weight})["q"]
    expected = np.asarray(weight.base, np.float64) + 0.5 * np.asarray(weight.a, np.float64) @ np.asarray(weight.b)
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_nested_adapters_leave_the_inner_one_frozen():
    inner = example()
    outer = LoRA(inner, inner.a, inner.b, inner.scale)
    trainable, _ = partition({"q": outer}, adapters)
    assert trainable["q"].a is not None and trainable["q"].base.a is None
