"""The doors against numpy in float64, on one device and on eight."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmtune.sharding import Strategy, make_mesh, put
from llmtune.weights import LoRA, Tied, embed_lookup, expert_linear, head_loss, linear

TENSOR = Strategy(
    "tensor", {"batch": ("fsdp",), "embed": ("fsdp",), "vocab": ("tensor",), "act_vocab": ("tensor",)}, gather=("fsdp",)
)
SINGLE = ({}, 1)
EIGHT = ({"fsdp": 4, "tensor": 2}, 8)


@pytest.fixture(params=[SINGLE, EIGHT], ids=["1 device", "8 devices"])
def mesh(request):
    sizes, count = request.param
    with jax.set_mesh(make_mesh(sizes, jax.devices()[:count])) as mesh:
        yield jax.sharding.get_mesh() if mesh is None else make_mesh(sizes, jax.devices()[:count])


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def place(mesh, array, *axes):
    return put(np.asarray(array), NamedSharding(mesh, TENSOR.spec(*axes)))


def run(function, *arguments):
    def traced(*arguments):
        with TENSOR.active():
            return function(*arguments)

    return jax.jit(traced)(*arguments)


def test_linear(mesh):
    x, w = random(8, 5, 16), random(16, 32, seed=1)
    out = run(
        lambda x, w: linear(x, w, ("batch", "seq", "act_vocab")),
        place(mesh, x, "batch", "seq", None),
        place(mesh, w, "embed", "vocab"),
    )
    np.testing.assert_allclose(out, x.astype(np.float64) @ w, atol=1e-5)


def test_embed_lookup_and_its_gradient(mesh):
    table, ids = random(32, 16), np.random.default_rng(0).integers(0, 32, (8, 7)).astype(np.int32)
    weight = random(8, 7, 16, seed=2)

    def loss(table, ids, weight):
        return (embed_lookup(ids, table) * weight).sum()

    gradient = run(
        jax.grad(loss),
        place(mesh, table, "vocab", "embed"),
        place(mesh, ids, "batch", "seq"),
        place(mesh, weight, "batch", "seq", None),
    )
    expected = np.zeros_like(table)
    np.add.at(expected, ids, weight)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_expert_linear(mesh):
    x, w, sizes = random(12, 16), random(3, 16, 8, seed=1), np.array([5, 0, 7], np.int32)
    out = run(
        lambda x, w, sizes: expert_linear(x, w, sizes, (None, None)),
        place(mesh, x, None, None), place(mesh, w, None, None, None), place(mesh, sizes, None),
    )  # fmt: skip
    np.testing.assert_allclose(out, np.concatenate([x[:5] @ w[0], x[5:] @ w[2]]), atol=1e-5)


def heads(mesh):
    w, a, b = random(16, 32, seed=1), random(16, 2, seed=3), random(2, 32, seed=4)
    yield "array", place(mesh, w, "embed", "vocab"), w
    yield "tied", Tied(place(mesh, w.T, "vocab", "embed")), w
    lora = LoRA(
        place(mesh, w, "embed", "vocab"),
        place(mesh, a, "embed", "rank"),
        place(mesh, b, "rank", "vocab"),
        jnp.float32(0.5),
    )
    yield "lora", lora, w + 0.5 * a @ b
    tied = LoRA(Tied(place(mesh, w.T, "vocab", "embed")), lora.a, lora.b, lora.scale)
    yield "lora on tied", tied, w + 0.5 * a @ b


@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_head_loss_of_every_kind_of_head(mesh, chunk):
    hidden, targets = random(8, 11, 16), np.random.default_rng(0).integers(0, 32, (8, 11)).astype(np.int32)
    for kind, weight, dense in heads(mesh):

        def both(h, w, t):
            return head_loss(h, w, t, chunk=chunk)

        h, t = place(mesh, hidden, "batch", "seq", None), place(mesh, targets, "batch", "seq")
        log_probs, totals = run(both, h, weight, t)
        logits = hidden.astype(np.float64) @ dense
        expected = np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(totals, expected, atol=1e-5, err_msg=kind)
        picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(log_probs, picked - expected, atol=1e-5, err_msg=kind)

        gradient = run(jax.grad(lambda h, w, t: both(h, w, t)[0].sum()), h, weight, t)
        onehot = np.eye(32)[targets]
        probabilities = np.exp(logits - expected[..., None])
        np.testing.assert_allclose(gradient, (onehot - probabilities) @ dense.T, atol=1e-4, err_msg=kind)


@pytest.mark.parametrize(("kept", "products"), [(0, 4), (2**28, 3)])
def test_a_heads_gradient_is_the_same_whether_logits_are_kept_or_formed_again(monkeypatch, kept, products):
    """Logits, the gradient towards hidden, that of the head: three products, and a fourth where logits are not kept."""
    monkeypatch.setattr(importlib.import_module("llmtune.weights.head_loss"), "KEPT", kept)
    hidden, head = random(8, 11, 16), random(16, 32, seed=1)
    targets = np.random.default_rng(0).integers(0, 32, (8, 11)).astype(np.int32)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        loss = jax.value_and_grad(lambda w, h: head_loss(h, w, jnp.asarray(targets), chunk=4)[0].sum(), argnums=(0, 1))
        compiled = jax.jit(loss).lower(head, hidden).compile()
        _, (found, _) = compiled(head, hidden)
        assert compiled.as_text().count(" dot(") == products
    logits = hidden.astype(np.float64) @ head
    error = np.eye(32)[targets] - np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bse,bsv->ev", hidden, error), atol=1e-4)


def test_head_loss_never_holds_the_logits_of_whole_rows(mesh):
    batch, seq, vocab = 8, 64, 32

    def loss(h, w, t):
        return head_loss(h, w, t, chunk=16)[0].sum()

    for _, weight, _ in heads(mesh):
        h = place(mesh, random(batch, seq, 16), "batch", "seq", None)
        t = place(mesh, np.zeros((batch, seq), np.int32), "batch", "seq")

        def traced(h, w, t):
            with TENSOR.active():
                return jax.grad(loss, argnums=0)(h, w, t)

        shapes = set(every_shape(jax.make_jaxpr(traced)(h, weight, t).jaxpr))
        assert not [s for s in shapes if np.prod(s) >= batch * seq * vocab]


def every_shape(jaxpr):
    """Shapes of all intermediate values of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if hasattr(variable.aval, "shape"):
                yield tuple(variable.aval.shape)
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from every_shape(inner)
