"""Operators on weights of experts: what each expert's matrix gives alone, and its gradients, by numpy and torch in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmtune.sharding import REPLICATED, make_mesh
from llmtune.weights import (
    FORMATS,
    IA3,
    ArraySpec,
    Bottleneck,
    Branch,
    DoRA,
    LoRA,
    VeRA,
    expert_linear,
    join_shared,
    layer,
    map_fields,
    measured,
    split_shared,
)

IN, OUT, RANK, LAYERS, EXPERTS, SIZE = 24, 16, 4, 3, 4, 5
SIZES = np.array([2, 0, 5, 1], np.int32)
OF = np.repeat(np.arange(EXPERTS), SIZES)  # the expert of each row but the last
AXES = ("expert", "batch", None, "act_mlp")


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def lora(base, *lead):
    return LoRA(base, draw(*lead, IN, RANK), draw(*lead, RANK, OUT), jnp.full(lead, 0.5))


def dora(base, *lead):
    weight = DoRA(lora(base, *lead), 1 + draw(*lead, OUT) ** 2, draw(*lead, OUT))
    return measured({"down": weight}, magnitude=False)["down"]


def taken(base, *lead):
    own = lora(base, *lead)
    return LoRA(base, own.a, own.b, -0.3 * own.scale, taken=True)


OPERATORS = {
    "lora": lora,
    "dora": dora,
    "dora from an initialiser": lambda base, *lead: dora(taken(base, *lead), *lead),
    "vera": lambda base, *lead: VeRA(
        base, draw(IN + 5, RANK), draw(RANK, OUT + 3), draw(*lead, RANK), draw(*lead, OUT)
    ),
    "ia3 out": lambda base, *lead: IA3(base, draw(*lead, OUT), jnp.ones(lead)),
    "ia3 in": lambda base, *lead: IA3(base, draw(*lead, IN), jnp.ones(lead), "in"),
}


def bottleneck(*lead):
    shapes = ((OUT, SIZE), (SIZE,), (SIZE, OUT), (OUT,))
    return Bottleneck(draw(*lead, IN, OUT), Branch(*(draw(*lead, *shape) for shape in shapes)))


def quantised(base, *lead):
    matrix = draw(*lead, IN, OUT)
    return matrix if base is None else FORMATS[base](ArraySpec(matrix.shape, (None,) * matrix.ndim)).encode(matrix)


def rows():
    return draw(len(OF) + 1, IN)


def through(weight, x):
    return expert_linear(x[None, None], weight, jnp.asarray(SIZES)[None, None], AXES)[0, 0]


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])), REPLICATED.active():
        yield


BASES = [None, *(pytest.param(base, marks=pytest.mark.nightly) for base in FORMATS if base != "nf4"), "nf4"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_apply_is_the_product_with_each_experts_dense(name, base):
    weight, x = OPERATORS[name](quantised(base, EXPERTS), EXPERTS), rows()
    whole = np.asarray(weight.dense(), np.float64)
    expected = np.einsum("ri,rio->ro", np.asarray(x[:-1], np.float64), whole[OF])
    out = jax.jit(through)(weight, x)
    np.testing.assert_allclose(out[:-1], expected, atol=1e-5 * np.abs(expected).max())
    assert not np.any(out[-1])  # a row that no expert was chosen for


BY_NIGHT = ("lora", "ia3 out", "dora from an initialiser")


@pytest.mark.parametrize(
    "name", [pytest.param(own, marks=pytest.mark.nightly) if own in BY_NIGHT else own for own in OPERATORS]
)
def test_stacks_are_scanned_layer_by_layer(name):
    weight, x = OPERATORS[name](quantised(None, LAYERS, EXPERTS), LAYERS, EXPERTS), rows()
    stacked, shared = split_shared(weight)
    out = jax.jit(jax.lax.scan, static_argnums=0)(
        lambda _, own: (None, through(join_shared(own, shared), x)), None, stacked
    )[1]
    for number in range(LAYERS):
        whole = np.asarray(layer(weight, number).dense(), np.float64)
        expected = np.einsum("ri,rio->ro", np.asarray(x[:-1], np.float64), whole[OF])
        np.testing.assert_allclose(out[number][:-1], expected, atol=1e-5 * np.abs(expected).max())


def test_dora_on_experts_is_its_definition():
    weight, x = dora(draw(EXPERTS, IN, OUT), EXPERTS), np.asarray(rows(), np.float64)
    out = jax.jit(through)(weight, rows())
    a, b, base, length = (
        np.asarray(v, np.float64) for v in (weight.low.a, weight.low.b, weight.base, weight.magnitude)
    )
    for number, (row, expert) in enumerate(zip(x, OF, strict=False)):
        v = base[expert] + 0.5 * a[expert] @ b[expert]
        expected = row @ (length[expert] * v / np.linalg.norm(v, axis=0))
        np.testing.assert_allclose(out[number], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_dropout_is_of_what_goes_into_the_product(name):
    """A row is x @ base and what the adapter makes of the row with a share of it dropped: on average, what it is without."""
    weight = OPERATORS[name](draw(EXPERTS, IN, OUT), EXPERTS)
    inner = weight.low if name == "dora" else weight
    keyed = dataclasses.replace(inner, dropout=0.5, key=jax.random.key(0))
    keyed = dataclasses.replace(weight, low=keyed) if name == "dora" else keyed
    plain = np.asarray(through(weight, rows()))
    keys = jax.random.split(jax.random.key(1), 500)
    draws = jax.jit(lambda keys: jax.lax.map(lambda key: through(_with_key(keyed, key), rows()), keys))(keys)
    spread = np.asarray(draws).std(axis=0).max()
    assert spread > 0.1 and np.abs(np.asarray(draws).mean(axis=0) - plain).max() < 6 * spread / len(keys) ** 0.5
    unkeyed = _with_key(keyed, None)
    np.testing.assert_array_equal(through(unkeyed, rows()), plain)


def _with_key(weight, key):
    if isinstance(weight, DoRA):
        return dataclasses.replace(weight, low=dataclasses.replace(weight.low, key=key))
    return dataclasses.replace(weight, key=key)


# --- gradients ----------------------------------------------------------------------------------------------------


def torch_lora(x, w):
    return x @ w["base"] + 0.5 * x @ w["a"] @ w["b"]


def torch_dora(x, w):
    v = w["base"] + 0.5 * w["a"] @ w["b"]
    return x @ (w["magnitude"] * v / v.norm(dim=0).detach())


def torch_vera(x, w):
    return x @ w["base"] + (x @ w["a"][:IN] * w["inner"]) @ w["b"][:, :OUT] * w["outer"]


def torch_bottleneck(x, w):
    y = x @ w["base"]
    return y + torch.relu(y @ w["down"] + w["down_bias"]) @ w["up"] + w["up_bias"]


ALONE = {  # what one expert computes
    "lora": torch_lora,
    "dora": torch_dora,
    "vera": torch_vera,
    "ia3 out": lambda x, w: (x @ w["base"]) * w["gain"],
    "ia3 in": lambda x, w: (x * w["gain"]) @ w["base"],
    "bottleneck": torch_bottleneck,
}


def flat(node):
    """{name: array} of an operator and those inside it."""
    found = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            found |= flat(value)
        elif isinstance(value, jax.Array):
            found[field.name] = value
    return found


@pytest.mark.parametrize("name", list(ALONE))
def test_gradients_are_those_of_torch_expert_by_expert(name):
    base, x = draw(EXPERTS, IN, OUT), rows()
    weight = bottleneck(EXPERTS) if name == "bottleneck" else OPERATORS[name](base, EXPERTS)
    towards = draw(len(OF) + 1, OUT)

    def ours(weight, x):
        return (jnp.sin(through(weight, x)) * towards).sum()

    (weights, own_x) = jax.jit(jax.grad(ours, argnums=(0, 1)))(weight, x)
    arrays = {key: np.asarray(value, np.float64) for key, value in flat(weight).items()}
    shared = weight.shared
    leaves = {key: torch.tensor(value, requires_grad=True) for key, value in arrays.items()}
    theirs_x = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    total = torch.zeros(())
    for number, expert in enumerate(OF):
        own = {key: leaf if key in shared else leaf[expert] for key, leaf in leaves.items()}
        out = torch.sin(ALONE[name](theirs_x[number], own))
        total = total + (out * torch.tensor(np.asarray(towards[number]))).sum()
    total.backward()
    compared = [("x", own_x, theirs_x.grad.numpy())]
    trains = {}
    map_fields(lambda leaf, trainable: trains.setdefault(id(leaf), trainable), weight)
    names = [key for key, value in flat(weight).items() if trains[id(value)]]
    assert names
    compared += [(key, flat(weights)[key], leaves[key].grad.numpy()) for key in names]
    for key, value, expected in compared:
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max(), err_msg=key)


# --- memory -------------------------------------------------------------------------------------------------------


def shapes_made(jaxpr):
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            yield out.aval.dtype, tuple(out.aval.shape)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_made(inner)


def test_the_lengths_of_experts_columns_form_one_matrix_at_a_time():
    base = draw(LAYERS, EXPERTS, IN, OUT).astype(jnp.bfloat16)
    weight = dora(base, LAYERS, EXPERTS)
    large = EXPERTS * IN * OUT

    def measure(weight):
        return measured({"down": weight}, magnitude=True)["down"].magnitude

    def step(weight):
        return through(weight, rows())

    made = list(shapes_made(jax.make_jaxpr(measure)(weight).jaxpr))
    assert max(np.prod(shape) for _, shape in made) < large and ("float32", (IN, OUT)) in made
    one = layer(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weight), 0)
    gradient = jax.grad(lambda low, weight: step(dataclasses.replace(weight, low=low)).sum())
    plain = set(shapes_made(jax.make_jaxpr(jax.grad(lambda x: through(one.base, x).sum()))(rows()).jaxpr))
    made = set(shapes_made(jax.make_jaxpr(lambda w: gradient(w.low, w).a)(one).jaxpr)) - plain
    assert not [shape for _, shape in made if np.prod(shape) >= large]
