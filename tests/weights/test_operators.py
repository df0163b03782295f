"""Every linear operator: `apply` is x @ dense to 1e-5, alone, stacked, and one inside another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.sharding import REPLICATED, make_mesh
from llmtune.weights import (
    IA3,
    DoRA,
    LoRA,
    Tied,
    VeRA,
    beneath,
    dense,
    embed_lookup,
    expert_linear,
    join_shared,
    layer,
    linear,
    low_rank_values,
    measured,
    split_shared,
    unembed,
    with_dropout_keys,
)

IN, OUT, RANK, LAYERS, EXPERTS = 24, 16, 4, 3, 4
OUT_AXES = ("batch", "seq", "act_mlp")


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def lora(*lead, **more):
    return LoRA(draw(*lead, IN, OUT), draw(*lead, IN, RANK), draw(*lead, RANK, OUT), jnp.full(lead, 0.5), **more)


def dora(*lead, **more):
    columns = draw(*lead, OUT)
    return measure(DoRA(lora(*lead, **more), 1 + columns**2, columns))


def measure(weight):
    return measured({"q": weight}, magnitude=False)["q"]


def ia3(side, *lead):
    return IA3(draw(*lead, IN, OUT), draw(*lead, IN if side == "in" else OUT), jnp.ones(lead), side)


def vera(*lead):
    return VeRA(draw(*lead, IN, OUT), draw(IN + 5, RANK), draw(RANK, OUT + 3), draw(*lead, RANK), draw(*lead, OUT))


def pissa(*lead):
    outer = lora(*lead)
    return LoRA(LoRA(outer.base, outer.a, outer.b, -outer.scale, taken=True), outer.a,
                2 * outer.b, outer.scale)  # fmt: skip


OPERATORS = {
    "lora": lora, "dora": dora, "ia3 out": lambda *lead: ia3("out", *lead), "ia3 in": lambda *lead: ia3("in", *lead),
    "vera": vera, "an initialiser's": pissa,
    "dora on lora": lambda *lead: measure(
        DoRA(LoRA(lora(*lead), draw(*lead, IN, RANK), draw(*lead, RANK, OUT), jnp.full(lead, 0.3)),
             draw(*lead, OUT), draw(*lead, OUT))),
}  # fmt: skip


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])), REPLICATED.active():
        yield


@pytest.mark.parametrize("name", list(OPERATORS))
def test_apply_is_the_product_with_dense(name):
    weight, x = OPERATORS[name](), draw(2, 3, IN)
    expected = np.asarray(x, np.float64) @ np.asarray(weight.dense(), np.float64)
    np.testing.assert_allclose(linear(x, weight, OUT_AXES), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_stack_is_scanned_layer_by_layer(name):
    weight, x = OPERATORS[name](LAYERS), draw(2, 3, IN)
    stacked, shared = split_shared(weight)
    out = jax.lax.scan(lambda _, own: (None, linear(x, join_shared(own, shared), OUT_AXES)), None, stacked)[1]
    whole = np.asarray(dense(weight))
    for number in range(LAYERS):
        np.testing.assert_allclose(layer(weight, number).dense(), whole[number], atol=1e-5)
        expected = np.asarray(x, np.float64) @ whole[number]
        np.testing.assert_allclose(out[number], expected, atol=1e-5 * np.abs(expected).max())


def test_dora_equals_its_definition_and_takes_no_gradient_through_the_lengths():
    weight, x = dora(), draw(2, 3, IN)
    v = np.asarray(weight.low.dense(), np.float64)
    expected = x @ (np.asarray(weight.magnitude) * v / np.linalg.norm(v, axis=0))
    np.testing.assert_allclose(linear(x, weight, OUT_AXES), expected, rtol=1e-4, atol=1e-4)

    def loss(a, lengths):
        v = weight.base + 0.5 * a @ weight.low.b
        return jnp.sin(x @ (weight.magnitude * v / lengths(v))).sum()

    def ours(a):
        low = LoRA(weight.base, a, weight.low.b, weight.low.scale)
        return jnp.sin(linear(x, DoRA(low, weight.magnitude, weight.square), OUT_AXES)).sum()

    detached = jax.grad(lambda a: loss(a, lambda v: jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))))(weight.low.a)
    through = jax.grad(lambda a: loss(a, lambda v: jnp.linalg.norm(v, axis=0)))(weight.low.a)
    np.testing.assert_allclose(jax.grad(ours)(weight.low.a), detached, rtol=1e-3, atol=1e-3)
    assert np.abs(through - detached).max() > 0.1


def test_layers_that_are_not_adapted_stay_as_they_are():
    for weight in (dora(LAYERS), ia3("out", LAYERS)):
        off = jnp.zeros(LAYERS).at[1].set(0.5)
        if isinstance(weight, DoRA):
            low = LoRA(weight.base, weight.low.a, weight.low.b, off)
            weight = DoRA(low, weight.magnitude, weight.square)
        else:
            weight = IA3(weight.base, weight.gain, off)
        out = np.asarray(weight.dense())
        np.testing.assert_array_equal(out[[0, 2]], np.asarray(weight.base)[[0, 2]])
        assert np.abs(out[1] - weight.base[1]).max() > 0.1


def test_lora_on_experts_is_each_experts_own():
    weight, sizes, x = lora(EXPERTS), jnp.array([2, 0, 5, 1], jnp.int32), draw(9, IN)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        rows = x[None, None]
        out = expert_linear(rows, weight, sizes[None, None], ("expert", "batch", None, "act_mlp"))[0, 0]
    whole = np.asarray(weight.dense(), np.float64)
    expert = np.repeat(np.arange(EXPERTS), sizes)
    expected = np.einsum("ri,rio->ro", np.asarray(x[:8], np.float64), whole[expert])
    np.testing.assert_allclose(out[:8], expected, atol=1e-5 * np.abs(expected).max())
    assert not np.any(out[8:])


def test_lora_on_a_table_serves_both_of_its_ends():
    weight, ids = lora(), jnp.array([[3, 0, 23], [1, 1, 5]], jnp.int32)
    whole = np.asarray(weight.dense())
    np.testing.assert_allclose(embed_lookup(ids, weight), whole[np.asarray(ids)], atol=1e-5)
    x = draw(2, 3, OUT)
    np.testing.assert_allclose(unembed(x, weight, ("batch", "seq", "act_vocab")), x @ whole.T, atol=1e-4)


def test_what_has_no_such_product_says_so():
    for call in (lambda: ia3("out").lookup(None), lambda: ia3("out").apply_transposed(None, ())):
        with pytest.raises(TypeError, match="IA3"):
            call()
    with pytest.raises(TypeError, match="Tied is not a weight of experts"):
        Tied(draw(IN, OUT)).expert_apply(None, None, ())


def test_an_initialisers_part_is_joined_to_its_adapter():
    weight = pissa(LAYERS)
    values = low_rank_values(weight)
    joined = LoRA(beneath(weight), values.a, values.b, values.scale)
    assert values.a.shape[-1] == 2 * RANK and isinstance(beneath(weight), jax.Array)
    np.testing.assert_allclose(joined.dense(), weight.dense(), atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_dropout_follows_from_the_key_and_is_off_without_one(name):
    plain, weight = (OPERATORS[name](LAYERS, dropout=rate) for rate in (0.0, 0.4))
    x = draw(2, 300, IN)
    out = lambda w: np.asarray(linear(x, layer(w, 1), OUT_AXES))  # noqa: E731
    np.testing.assert_array_equal(out(weight), out(plain))
    one, same, other = (with_dropout_keys({"q": weight}, jax.random.key(seed))["q"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(out(one), out(same))
    assert np.abs(out(one) - out(other)).max() > 0.1
    assert out(one).mean() == pytest.approx(out(plain).mean(), abs=0.2)
    both = with_dropout_keys({"q": weight, "k": weight}, jax.random.key(0))
    assert np.abs(out(both["q"]) - out(both["k"])).max() > 0.1
    keys = np.asarray(jax.random.key_data((one.low if name == "dora" else one).key))
    assert len(keys) == LAYERS and len(np.unique(keys, axis=0)) == LAYERS


def test_dropout_drops_what_goes_into_the_product_alone():
    weight = lora(dropout=0.5)
    weight = LoRA(jnp.zeros((IN, OUT)), jnp.eye(IN)[:, :RANK], jnp.eye(RANK, OUT), jnp.ones(()), dropout=0.5)
    weight = with_dropout_keys({"q": weight}, jax.random.key(0))["q"]
    out = np.asarray(linear(jnp.ones((4, 500, IN)), weight, OUT_AXES))[..., :RANK]
    assert set(np.unique(out)) == {0.0, 2.0} and abs((out == 0).mean() - 0.5) < 0.02
