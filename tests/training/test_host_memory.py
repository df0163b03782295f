"""Moments that wait in the host's memory: the same run as on the device, to the last bit, stopped and resumed too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune import pretrained
from llmtune.errors import LlmtuneConfigError
from llmtune.models.decoder import declare
from llmtune.planning.abstract import abstract_program, device_bytes
from llmtune.training.checkpoint.digest import digests
from llmtune.training.host_memory import KIND, weight_by_weight
from llmtune.training.program import build_program
from llmtune.training.state import TrainState
from llmtune.training.weights import choose_layout
from tests.runs import curve, fixed_batches, run_config, write_rows
from tests.training.test_resume import train_until

NAMES = ["adamw", "adamw_8bit", "adafactor", "lion", "muon", "sgd"]  # the first by day


@pytest.fixture(scope="module")
def data(assets, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *fixed_batches(assets))


def small(directory, model, data, name, memory, **sections):
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 3, "memory": memory, **sections.pop("optimizer", {})}
    train = {"steps": 8, "batch_size": 8, "dtype": "float32"}
    return run_config(directory, model, data, name, optimizer=optimizer, **{"train": train, **sections})


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == NAMES[0] else pytest.mark.nightly) for n in NAMES])
def test_the_curve_is_that_of_moments_on_the_device(stories, data, tmp_path, name):
    """On eight devices, with an average of the weights, which is a part of the state that stays."""
    own = {"optimizer": {"name": name}, "average": {"decay": 0.9}}
    device, host = (curve(small(tmp_path, stories, data, m, m, **own), devices=8) for m in ("device", "host"))
    np.testing.assert_allclose(host[0], device[0], rtol=1e-6)
    np.testing.assert_allclose(host[1], device[1], rtol=1e-5)


def test_stopped_and_resumed_it_is_the_same_run(stories, data, tmp_path):
    whole = curve(small(tmp_path, stories, data, "whole", "host", adapt={"rank": 4, "alpha": 8}))
    run = small(tmp_path, stories, data, "stopped", "host", adapt={"rank": 4, "alpha": 8})
    train_until(run, 3)
    train_until(
        small(tmp_path, stories, data, "stopped", "device", adapt={"rank": 4, "alpha": 8}), 6
    )  # where they wait may change
    np.testing.assert_array_equal(curve(run)[0], whole[0])


def test_a_step_that_is_not_finite_leaves_moments_as_they_were():
    """The guard chooses between moments before and after, which must be in one memory."""
    weights = {"a": jnp.arange(4.0), "b": jnp.ones(3)}

    def propose(opt_state):
        good = jnp.array(False)
        new = jax.tree.map(lambda m: jnp.where(good, m + 1, m) if m.ndim else m, opt_state)
        return TrainState(jnp.ones((), jnp.int32), weights, new), {}

    @jax.jit
    def step(opt_state):
        return weight_by_weight(propose, opt_state, weights)[0].opt_state

    moments = {
        "count": jnp.zeros((), jnp.int32),
        "mu": {"a": jnp.full(4, 2.0), "b": jnp.full(3, 5.0)},
        "odd": jnp.ones(2),
    }
    waiting = jax.tree.map(lambda m: jax.device_put(m, jax.memory.Space.Host) if m.ndim else m, moments)
    after = step(waiting)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(after) if leaf.ndim} == {KIND}
    jax.tree.map(np.testing.assert_array_equal, after, moments)


@pytest.mark.parametrize("memory", ["device", "host"])
def test_where_moments_are_and_what_a_plan_counts(stories, data, tmp_path, memory):
    run = small(tmp_path, stories, data, "run", memory)
    source = pretrained.open_source(run.model)
    mesh, strategy = choose_layout(None, declare(source.config)[1], jax.devices())
    with jax.set_mesh(mesh):
        _, state = build_program(run, source, 8, mesh, strategy, lambda done: None)
        _, inputs = abstract_program(run, source, mesh, strategy)
    planned = jax.tree.leaves(inputs.state.opt_state)
    for leaf, plan in zip(jax.tree.leaves(state.opt_state), planned, strict=True):
        assert (
            (leaf.sharding.memory_kind == KIND)
            == (plan.sharding.memory_kind == KIND)
            == (memory == "host" and leaf.ndim > 0)
        )
    trained = device_bytes(jax.tree.leaves(state.trainable))
    assert device_bytes(planned) > 2 * trained if memory == "device" else device_bytes(planned) < 100


def test_digests_do_not_depend_on_the_memory():
    tree = {"count": jnp.int32(3), "mu": jnp.arange(12.0).reshape(3, 4), "nu": jnp.ones(5)}
    waiting = jax.tree.map(lambda own: jax.device_put(own, jax.memory.Space.Host) if own.ndim else own, tree)
    assert waiting["mu"].sharding.memory_kind == KIND
    jax.tree.map(np.testing.assert_array_equal, digests(waiting), digests(tree))


def test_schedule_free_is_refused(stories, data, tmp_path):
    with pytest.raises(LlmtuneConfigError, match=r"optimizer\.memory: schedule_free_adamw needs its state"):
        small(tmp_path, stories, data, "run", "host", optimizer={"name": "schedule_free_adamw"})
