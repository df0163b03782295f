"""Steps that go wrong are not taken: nothing but the place in the data moves, and a run that only goes wrong ends by itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import llmtune
from llmtune.config import AdamW
from llmtune.config.divergence import Divergence
from llmtune.errors import LlmtuneDivergedError
from llmtune.optimizers import make_optimizer, make_schedule
from llmtune.sharding import Strategy, make_mesh
from llmtune.training.divergence import BadSteps
from llmtune.training.guard import skip_bad_steps, watch_spikes
from llmtune.training.loss_scale import scale_loss
from llmtune.training.state import init_state
from llmtune.training.step import make_train_step
from tests.runs import run_config, write_rows

CONFIG = AdamW(learning_rate=1e-2, warmup_steps=3, weight_decay=0.1)
ROWS, WIDTH = 8, 4
TABLE = Strategy("rows", {"batch": ("fsdp",)})
SCHEDULE = make_schedule(CONFIG, 50)


def squares(weights, batch):
    """A loss that is no number where `loss` of a row is none, and has a gradient that is none where `leaf` of a row is 0."""
    x = batch["tokens"].astype(jnp.float32)
    error = jnp.square(x @ weights["w"] - 1.0).sum() + (batch["loss"] * jnp.square(weights["w"]).sum()).sum()
    return error + jnp.sqrt(jnp.square(batch["leaf"] * weights["v"])).sum(), jnp.float32(x.shape[0]), {}


def batch_of(number, **poison):
    rng = np.random.default_rng(number)
    rows = {"tokens": rng.integers(1, 9, (ROWS, WIDTH)), "segment_ids": np.ones((ROWS, WIDTH), int)}
    rows |= {"loss": np.zeros((ROWS, 1), np.float32), "leaf": np.ones((ROWS, 1), np.float32)}
    for name, value in poison.items():
        rows[name][3] = value  # one row, which lies on one device
    return rows


def trainer(revisions, devices=1, microbatches=1):
    """(the first state, step(state, batch) -> (state, metrics)) on a mesh of so many devices."""
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    optimizer = make_optimizer(CONFIG, SCHEDULE)
    step = jax.jit(make_train_step(
        lambda weights: weights, squares, optimizer, SCHEDULE, TABLE, microbatches, revisions=revisions
    ))  # fmt: skip
    layout = NamedSharding(mesh, PartitionSpec("fsdp"))
    with jax.set_mesh(mesh):
        state = init_state({"w": jnp.ones(WIDTH), "v": jnp.ones(1)}, optimizer, revisions)

    def call(state, batch):
        with jax.set_mesh(mesh):
            return step(state, {"w": None, "v": None}, jax.device_put(batch, layout))

    return state, call


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), one, other))


BAD = {"nan": {"loss": np.nan}, "inf": {"loss": np.inf}, "one leaf": {"leaf": 0.0}}


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (1, 4), (8, 1)])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("at", [0, 4])
def test_a_bad_step_leaves_everything_as_it_was(kind, at, devices, microbatches):
    state, step = trainer((skip_bad_steps(SCHEDULE),), devices, microbatches)
    unharmed, _ = trainer((skip_bad_steps(SCHEDULE),), devices, microbatches)
    rates, expected = [], []
    for number in range(7):
        if number == at:
            before = state
            state, metrics = step(state, batch_of(number, **BAD[kind]))
            assert metrics["skipped"] == 1 and same(
                (before.trainable, before.opt_state), (state.trainable, state.opt_state)
            )
            assert int(state.step) == number + 1
            continue
        state, metrics = step(state, batch_of(number))
        assert metrics["skipped"] == 0
        rates.append(float(metrics["learning_rate"]))
        unharmed, others = step(unharmed, batch_of(number))
        expected.append(float(others["learning_rate"]))
    assert rates == expected and same(state.trainable, unharmed.trainable) and same(state.opt_state, unharmed.opt_state)


def test_without_the_guard_a_bad_step_is_applied():
    state, step = trainer(())
    state, _ = step(state, batch_of(0, loss=np.nan))
    assert not np.isfinite(state.trainable["w"]).any()  # else the test above would see nothing


def test_overflow_halves_the_loss_scale_and_good_steps_double_it():
    state, step = trainer((skip_bad_steps(SCHEDULE), scale_loss(2.0**4, interval=3)))
    plain, plain_step = trainer((skip_bad_steps(SCHEDULE),))
    scales = []
    for number in range(9):
        bad = number in (2, 3)
        state, metrics = step(state, batch_of(number, **({"loss": np.inf} if bad else {})))
        scales.append(float(metrics["loss_scale"]))
        assert (metrics["skipped"], metrics["overflow"]) == (bad, bad)
        if not bad:
            plain, others = plain_step(plain, batch_of(number))
            assert float(metrics["loss"]) == pytest.approx(float(others["loss"]), rel=1e-6)
    assert scales == [16, 16, 16, 8, 4, 4, 4, 8, 8]
    np.testing.assert_allclose(state.trainable["w"], plain.trainable["w"], rtol=1e-6)


def test_a_spike_is_skipped_and_a_thousand_normal_steps_are_not():
    spiked = watch_spikes(128, 6.0)
    state, _ = trainer((spiked,))

    def normal(number):  # losses that fall and scatter, norms that scatter by a factor
        return 3 * np.exp(-number / 300) + 1.2, 0.15, 0.5

    rng = np.random.default_rng(0)
    observe = jax.jit(spiked.revise)
    false = 0
    for number in range(1000):
        level, scatter, spread = normal(number)
        figures = {
            "loss": jnp.float32(level + scatter * rng.normal()),
            "grad_norm": jnp.float32(np.exp(spread * rng.normal())),
        }
        state, metrics = observe(state, state, figures)
        false += float(metrics["spike"])
    assert false == 0
    for loss, norm in ((1.3e3, 1.0), (1.3, 1e3)):
        assert observe(state, state, {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)})[1]["spike"] == 1


def test_a_skipped_spike_does_not_become_usual():
    state, step = trainer((watch_spikes(8, 6.0), skip_bad_steps(SCHEDULE, lambda state, metrics: metrics["spike"] > 0)))
    for number in range(8):
        state, metrics = step(state, batch_of(number))
        assert metrics["skipped"] == 0
    for number in range(20):
        before = state
        state, metrics = step(state, {**batch_of(number), "tokens": 1000 * batch_of(number)["tokens"]})
        assert metrics["spike"] == metrics["skipped"] == 1
        assert same(
            (before.trainable, before.opt_state, before.recent), (state.trainable, state.opt_state, state.recent)
        )


def row(step, **figures):
    return {"step": step, "loss": 2.0, "grad_norm": 1.0, "skipped": 0.0, **figures}


def test_bad_steps_in_a_row_end_the_run():
    said = []
    bad = BadSteps(Divergence(in_a_row=3), said.append)
    for number, skipped in enumerate([1, 1, 0, 1, 1]):
        assert not bad.see(row(number, skipped=skipped, loss=float("nan") if skipped else 2.0))
    with pytest.raises(LlmtuneDivergedError, match="step 9: 3 bad steps in a row") as caught:
        bad.see(row(9, skipped=1, loss=float("nan")))
    assert caught.value.exit_code == 76 and len(said) == 4
    assert not any(bad.see(row(n, skipped=1, overflow=1)) for n in range(20))  # float16 looks for its scale


@pytest.mark.parametrize(("spikes", "back"), [("warn", False), ("skip", False), ("roll_back", True)])
def test_what_is_done_about_a_spike(spikes, back):
    said = []
    policy = BadSteps(Divergence(spikes=spikes), said.append)
    assert policy.see(row(5, spike=1.0, skipped=float(spikes != "warn"), loss=50.0)) == back
    assert len(said) == 1 and "step 5: a spike (loss 50" in said[0]
    with pytest.raises(LlmtuneDivergedError):
        BadSteps(Divergence(spikes="stop"), said.append).see(row(5, spike=1.0, skipped=1.0))


def test_a_run_that_only_goes_wrong_ends_with_code_76_and_good_weights(stories, batches, tmp_path):
    """A rate of 1e30: the first update is applied, and no loss is a number after it."""
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    run = run_config(
        tmp_path, stories, data, optimizer={"name": "sgd", "learning_rate": 1e30, "warmup_steps": 1, "clip_norm": None},
        adapt={"rank": 2}, checkpoint={"every": 1}, train={"steps": 9, "batch_size": 4, "dtype": "float32"},
        divergence={"in_a_row": 3},
    )  # fmt: skip
    with pytest.raises(LlmtuneDivergedError, match="3 bad steps in a row") as caught:
        llmtune.train(run, devices=jax.devices()[:1])
    assert caught.value.exit_code == 76 and len(str(caught.value).splitlines()) == 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows][-3:] == [1, 1, 1] and rows[0]["skipped"] == 0


def test_a_roll_back_brings_the_state_of_the_good_step_bit_for_bit(stories, batches, tmp_path):
    """Twelve batches of text and one of noise: what is saved after it is what was saved before, but for the place in the data."""
    tokens, labels = (own[:13].copy() for own in batches)
    tokens[12] = np.random.default_rng(0).integers(3, 512, tokens[12].shape)
    labels[12] = tokens[12]
    run = run_config(
        tmp_path, stories, write_rows(tmp_path / "rows.jsonl", tokens, labels), checkpoint={"every": 5, "keep": 9},
        train={"steps": 13, "batch_size": 4, "dtype": "float32"},
        divergence={"spikes": "roll_back", "window": 8, "sigmas": 4.0},
    )  # fmt: skip
    llmtune.train(run, devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["spike"]] == [13]
    good, back = (
        json.loads((tmp_path / f"run/checkpoints/{step}/MANIFEST.json").read_text())["arrays"] for step in (10, 13)
    )
    assert good.keys() == back.keys() and len(good) > 30
    assert [name for name in good if good[name] != back[name]] == ["step"]
