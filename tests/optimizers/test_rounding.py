"""bfloat16 weights rounded by chance: the mean is right, small updates stay, any mesh and any restart draws the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmtune.config.optimizers import OPTIMIZERS
from llmtune.optimizers import make_optimizer, make_schedule, rounded_by_chance
from llmtune.optimizers.rounding import round_by_chance
from llmtune.sharding import make_mesh
from tests.runs import curve, run_config, write_rows
from tests.training.interruption import train_until

DRAWS = 4096


def neighbours(values):
    """(the bfloat16 at or below in magnitude, the next one away from zero), as float64, by numpy."""
    bits = np.asarray(values, np.float32).view(np.uint32) >> 16 << 16
    return bits.view(np.float32).astype(np.float64), (bits + 0x10000).view(np.float32).astype(np.float64)


def test_the_mean_of_many_draws_is_the_number():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=24), rng.normal(size=24) * 1e-20, -(2.0 ** rng.uniform(-120, 120, 16))])
    values = values.astype(np.float32)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: round_by_chance(jnp.asarray(values), key)))(keys), np.float64)
    low, high = neighbours(values)
    assert ((drawn == low) | (drawn == high)).all()
    share = (values - low) / (high - low)
    sigma = np.abs(high - low) * np.sqrt(share * (1 - share) / DRAWS)
    apart = (drawn.mean(0) - values) / sigma
    assert np.abs(apart).max() < 3 and np.sqrt(np.square(apart).mean()) < 1.3


def test_what_bfloat16_holds_and_what_is_no_number_stays():
    exact = jnp.asarray([0.0, -0.0, 1.0, -3.5, 2.0**-126, jnp.inf, -jnp.inf], jnp.float32)
    never = jnp.asarray(np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32))
    for seed in range(64):
        np.testing.assert_array_equal(round_by_chance(exact, jax.random.key(seed)), exact)
        assert jnp.isnan(round_by_chance(never, jax.random.key(seed))).all()


def walk(optimizer, steps):
    """4,096 weights of 1 that go down by 2^-12 of theirs in each step."""
    weights = {"w": jnp.ones(DRAWS, jnp.bfloat16)}

    def step(carried, _):
        weights, state = carried
        updates, state = optimizer.update({"w": jnp.full(DRAWS, 2.0**-12)}, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), None, steps)
    assert weights["w"].dtype == jnp.bfloat16
    return np.asarray(weights["w"], np.float64)


def test_updates_that_rounding_to_the_nearest_loses_are_kept():
    counted = optax.chain(optax.scale_by_schedule(lambda count: 1.0), optax.scale(-1.0))
    assert (walk(counted, 256) == 1).all()
    ended, expected = walk(rounded_by_chance(counted, 0), 256), 1 - 256 * 2.0**-12
    # below 1 a bfloat16 is 2^-8: each step is 2^-8 with probability 1 / 16
    sigma = 2.0**-8 * np.sqrt(256 / 16 * 15 / 16)
    assert abs(ended.mean() - expected) < 3 * sigma / np.sqrt(DRAWS) and ended.std() == pytest.approx(sigma, rel=0.1)


def updated(config, devices, steps=3):
    """(weights, state) after updates by the same gradients."""
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    schedule = make_schedule(config, steps)
    optimizer = rounded_by_chance(make_optimizer(config, schedule), 5)
    rng = np.random.default_rng(0)
    values = {"layers": {"0": {"mlp": {"up": {"kernel": rng.normal(size=(2, 64, 128)).astype(np.float32)}}}}}
    layout = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda own: jax.device_put(jnp.asarray(own, jnp.bfloat16), layout), values)
        grads = jax.tree.map(lambda own: jax.device_put(own, layout), values)
        state = jax.jit(optimizer.init)(params)
        for _ in range(steps):
            updates, state = jax.jit(optimizer.update)(grads, state, params)
            params = jax.jit(optax.apply_updates)(params, updates)
    return jax.device_get(params), state


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(n, marks=pytest.mark.nightly) for n in OPTIMIZERS if n != "adamw")]
)
def test_every_optimizer_keeps_a_state_in_float32_and_draws_the_same_on_eight_devices(name):
    config = OPTIMIZERS[name](learning_rate=1e-3, warmup_steps=0)
    one, state = updated(config, 1)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))
    eight, _ = updated(config, 8)
    ours, theirs = (np.asarray(jax.tree.leaves(own)[0], np.float32) for own in (one, eight))
    assert (ours != theirs).mean() < (0.02 if name == "muon" else 0.001)  # sums in another order may cross a draw
    first, _ = updated(config, 1)
    np.testing.assert_array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(one)[0])


def test_a_run_in_half_the_bytes_follows_the_curve_of_float32_and_resumes(stories, batches, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", *batches)

    def run(name, masters):
        train = {"steps": 12, "batch_size": 4, "dtype": "bfloat16", "masters": masters}
        return run_config(tmp_path, stories, data, name=name, train=train, checkpoint={"every": 4, "keep": 2})

    wide = curve(run("wide", "float32"))[0]
    whole = curve(run("whole", "bfloat16"))
    np.testing.assert_allclose(whole[0], wide, rtol=0.01)
    stopped = run("stopped", "bfloat16")
    train_until(stopped, 6)
    for ours, theirs in zip(curve(stopped), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    sizes = {
        name: sum(path.stat().st_size for path in (tmp_path / name / "checkpoints/12").rglob("*") if path.is_file())
        for name in ("wide", "whole")
    }
    assert sizes["whole"] < 0.9 * sizes["wide"]
