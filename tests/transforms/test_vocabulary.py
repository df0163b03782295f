"""A vocabulary of another size: what stays, what is drawn, and that declarations and arrays are mapped alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.sharding import REPLICATED, Strategy, make_mesh, put
from llmtune.transforms import resize_vocabulary, weights_by_path, without_vocabulary_axis
from llmtune.weights import materialize, shardings

CONFIG = ModelConfig("LlamaForCausalLM", 60, 32, 48, 3, 4, 2, 8)
TENSOR = Strategy("tensor", {"embed": ("fsdp",), "vocab": ("tensor",)}, ("fsdp",))


def ends(declared):
    """The parts of a model that have a vocabulary, and one that has none."""
    return {name: declared[name] for name in ("embed", "head", "norm")}


@functools.cache
def grow(size, tokens=60, axes=None, strategy=REPLICATED, dtype="float32"):
    """(before, after) of a random model on one device, or on eight with mesh axes of these sizes."""
    mesh = make_mesh(dict(axes)) if axes else make_mesh({}, jax.devices()[:1])
    declared = without_vocabulary_axis(ends(declare(CONFIG)[1]))
    draw = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        values = jax.tree.map(lambda spec: draw.normal(size=spec.shape).astype(dtype), declared)
        before = jax.tree.map(put, values, shardings(declared, mesh, strategy))
        transform = resize_vocabulary(tokens=tokens, size=size)
        noise = materialize(transform.init(declared), jax.random.key(1), mesh, strategy)

        @jax.jit
        def apply(params, noise):
            with strategy.active():
                return transform.apply(params, noise)

        return weights_by_path(before), weights_by_path(apply(before, noise))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_rows_stay_and_new_ones_lie_around_their_mean(dtype):
    before, after = grow(72, dtype=dtype)
    for path, axis in (("embed/table", 0), ("head/kernel", 1)):
        old, new = (np.moveaxis(np.asarray(tree[path]), axis, 0) for tree in (before, after))
        assert new.shape[0] == 72 and new[:60].tobytes() == old.tobytes()
        old, new = old.astype(np.float64), new[60:].astype(np.float64)
        rounding = np.abs(old.mean(0)) * (2**-8 if dtype == "bfloat16" else 0)
        assert np.all(np.abs(new - old.mean(0)) <= 5 * 1e-5**0.5 * old.std(0) + rounding + 1e-9)
        assert dtype == "bfloat16" or len(np.unique(new, axis=0)) == 12  # no two new tokens are the same
        spread = (new - old.mean(0)) / old.std(0)
        assert dtype == "bfloat16" or 0.8 < spread.std() / 1e-5**0.5 < 1.2
    for path in set(before) - {"embed/table", "head/kernel"}:
        assert np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes()


def test_rows_without_a_token_are_drawn_anew_and_a_table_can_be_cut():
    before, after = grow(60, tokens=50)
    old, new = np.asarray(before["embed/table"]), np.asarray(after["embed/table"])
    assert new.shape == old.shape and np.array_equal(new[:50], old[:50])
    assert np.abs(new[50:] - old[:50].mean(0)).max() < 2e-2  # the noise of unit rows
    _, cut = grow(50, tokens=50)
    assert np.array_equal(cut["head/kernel"], np.asarray(before["head/kernel"])[:, :50])


def test_declarations_are_mapped_as_arrays_are():
    declared = ends(declare(CONFIG)[1])
    transform = resize_vocabulary(tokens=60, size=72)
    grown = weights_by_path(transform.apply(declared, transform.init(declared)))
    _, after = grow(72)
    assert {path: spec.shape for path, spec in grown.items()} == {path: own.shape for path, own in after.items()}
    assert grown["embed/table"].axes == ("vocab", "embed")


def test_eight_devices_hold_what_one_does():
    _, one = grow(72)
    _, eight = grow(
        72, axes=(("fsdp", 2), ("tensor", 4)), strategy=TENSOR
    )  # 60 rows into 72, neither of them a multiple of eight
    for path in ("embed/table", "head/kernel"):
        np.testing.assert_allclose(eight[path], one[path], rtol=1e-6, atol=1e-8)
        assert len({str(shard.index) for shard in eight[path].addressable_shards}) == 8


def test_the_noise_does_not_move_the_old_tokens_share():
    """With the mean a new token is no likelier than an average one (Hewitt 2021): the old log-sum-exp hardly moves."""
    before, after = grow(72)
    hidden = jax.random.normal(jax.random.key(5), (40, 32))
    old, new = (jax.nn.logsumexp(hidden @ tree["head/kernel"], axis=-1) for tree in (before, after))
    assert jnp.all(new - old <= np.log(72 / 60) + 1e-4)
