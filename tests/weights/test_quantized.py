"""Quantised matrices: what they multiply by, how close that is, on one device and on eight, for experts, in scans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.transforms import adapters, partition
from llmtune.weights import FORMATS, NF4, ArraySpec, LoRA, expert_linear, head_loss, linear
from tests.weights.test_doors import EIGHT, SINGLE, mesh, place, random, run  # noqa: F401 (a fixture)

FORMS = {**FORMATS, "nf4, absmax float32": lambda matrix: NF4.declare(matrix, double=False)}
OTHERS = [form if form == "nf4" else pytest.param(form, marks=pytest.mark.nightly) for form in FORMATS]
FARTHEST = {
    "nf4": 0.16,
    "int4": 1 / 14,
    "int8": 1 / 254,
    "fp8": 1 / 28,
}  # half of the widest step, of the largest number


def encoded(form, devices, matrix, *axes):
    like = FORMS[form](ArraySpec(matrix.shape, axes))
    return jax.jit(like.encode)(place(devices, matrix, *axes))


@pytest.mark.parametrize("n_in", [128, 160], ids=["whole blocks", "a block filled up"])
@pytest.mark.parametrize("form", FORMS)
def test_apply_equals_the_dense_matrix(mesh, form, n_in):  # noqa: F811
    """Sharded along `in` inside a block, as a row-parallel matrix is: shards need not end where blocks do."""
    x, w = random(8, 5, n_in), random(n_in, 32, seed=1)
    weight = encoded(form, mesh, w, "embed", "vocab")
    dense = np.asarray(weight.dense(), np.float64)
    assert weight.shape == w.shape
    assert np.abs(dense - w).max() <= FARTHEST[form.split(",")[0]] * np.abs(w).max()
    out = run(lambda x, w: linear(x, w, ("batch", "seq", "act_vocab")), place(mesh, x, "batch", "seq", None), weight)
    np.testing.assert_allclose(out, x @ dense, atol=1e-5 * np.abs(x @ dense).max())


@pytest.mark.parametrize("form", OTHERS)
def test_a_scan_under_rematerialisation_has_the_gradient_of_the_dense_matrices(mesh, form):  # noqa: F811
    x, w = random(8, 5, 64), random(3, 64, 64, seed=1) / 8
    stack = encoded(form, mesh, w, None, "embed", None)
    layer = jax.checkpoint(lambda x, w: jnp.tanh(linear(x, w, ("batch", "seq", None))))

    def loss(x, stack):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, stack)[0].sum()

    rows = place(mesh, x, "batch", "seq", None)
    value, gradient = run(jax.value_and_grad(loss), rows, stack)
    plain = place(mesh, np.asarray(stack.dense()), None, "embed", None)
    expected, expected_gradient = run(jax.value_and_grad(loss), rows, plain)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize("form", OTHERS)
def test_experts(mesh, form):  # noqa: F811
    x, w, sizes = random(12, 96), random(3, 96, 8, seed=1), np.array([5, 0, 7], np.int32)
    weight = encoded(form, mesh, w, None, "embed", None)
    dense = np.asarray(weight.dense(), np.float64)
    out = run(
        lambda x, w, sizes: expert_linear(x, w, sizes, (None, None)),
        place(mesh, x, None, None), weight, place(mesh, sizes, None),
    )  # fmt: skip
    expected = np.concatenate([x[:5] @ dense[0], x[5:] @ dense[2]])
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", OTHERS)
def test_head_loss_of_a_quantised_head_and_of_an_adapter_on_it(mesh, form):  # noqa: F811
    hidden, targets = random(8, 11, 64) / 8, np.random.default_rng(0).integers(0, 32, (8, 11)).astype(np.int32)
    head = encoded(form, mesh, random(64, 32, seed=1), "embed", "vocab")
    a, b = place(mesh, random(64, 2, seed=3), "embed", "rank"), place(mesh, random(2, 32, seed=4), "rank", "vocab")
    for weight in (head, LoRA(head, a, b, jnp.float32(0.5))):

        def both(h, w, t):
            return head_loss(h, w, t, chunk=4)

        h, t = place(mesh, hidden, "batch", "seq", None), place(mesh, targets, "batch", "seq")
        log_probs, totals = run(both, h, weight, t)
        dense = np.asarray(weight.dense(), np.float64)
        logits = hidden @ dense
        expected = np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(totals, expected, atol=1e-5)
        picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(log_probs, picked - expected, atol=1e-5)
        gradient = run(jax.grad(lambda h, w, t: both(h, w, t)[0].sum()), h, weight, t)
        probabilities = np.exp(logits - expected[..., None])
        np.testing.assert_allclose(gradient, (np.eye(32)[targets] - probabilities) @ dense.T, atol=1e-4)


def test_eight_devices_hold_the_same_codes_as_one():
    from llmtune.sharding import make_mesh

    matrix, codes = random(160, 32, seed=1), []
    for sizes, count in (SINGLE, EIGHT):
        mesh = make_mesh(sizes, jax.devices()[:count])  # noqa: F811
        with jax.set_mesh(mesh):
            codes.append([np.asarray(leaf) for leaf in jax.tree.leaves(encoded("nf4", mesh, matrix, "embed", "vocab"))])
    for one, eight in zip(*codes, strict=True):
        np.testing.assert_allclose(one.astype(float), eight.astype(float), rtol=1e-6)


def test_nothing_of_a_quantised_matrix_trains():
    weight = FORMATS["nf4"](ArraySpec((64, 8), (None, None))).encode(jnp.asarray(random(64, 8)))
    trainable, frozen = partition(
        {"q": weight, "v": LoRA(weight, jnp.ones((64, 2)), jnp.ones((2, 8)), jnp.ones(()))}, adapters
    )
    assert {leaf.shape for leaf in jax.tree.leaves(trainable)} == {(64, 2), (2, 8)}
    assert len(jax.tree.leaves(frozen)) == 9


def test_a_column_of_zeros_stays_zeros():
    matrix = random(128, 8)
    matrix[:, 3] = 0
    for form in FORMATS:
        weight = FORMATS[form](ArraySpec(matrix.shape, (None, None))).encode(jnp.asarray(matrix))
        dense = np.asarray(weight.dense())
        assert np.isfinite(dense).all() and not dense[:, 3].any(), form


def test_what_trains_on_one_format_is_not_taken_for_what_trains_on_another():
    """Structures with holes: a program compiled for the one would give trees of the other."""
    factors = (np.zeros((8, 2)), np.zeros((2, 8)), np.ones(()))
    bases = [form(ArraySpec((8, 8), ("embed", "mlp"))) for form in FORMATS.values()]
    trees = [partition({"q": LoRA(base, *factors)}, adapters)[0] for base in bases]
    structures = [jax.tree.structure(tree) for tree in trees]
    assert not any(one == other for at, one in enumerate(structures) for other in structures[:at])
