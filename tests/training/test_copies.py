"""Copies of the weights beside the state: the moving average against numpy, the pull towards the start against torch."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmtune.config import AdamW
from llmtune.optimizers import make_optimizer, make_schedule
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.training.average import follow_average, remember_start
from llmtune.training.guard import skip_bad_steps
from llmtune.training.state import init_state
from llmtune.training.step import make_train_step

WIDTH, ROWS, STEPS = 16, 8, 40
CONFIG = AdamW(learning_rate=3e-2, schedule="constant", warmup_steps=0, weight_decay=0.1, clip_norm=None)
SCHEDULE = make_schedule(CONFIG, STEPS)


@dataclass(frozen=True)
class Linear:
    """The smallest model record."""

    weights: Any
    reference: Any = None


def squares(model, batch):
    """The sum over rows of a squared error; the reference is of no concern."""
    error = jnp.square(batch["tokens"] @ model.weights["w"] + model.weights["v"] - 1.0).sum()
    return error, jnp.float32(batch["tokens"].shape[0]), {}


def rows(number):
    drawn = np.random.default_rng(number).normal(size=(ROWS, WIDTH)).astype(np.float32)
    return {"tokens": drawn, "segment_ids": np.ones((ROWS, WIDTH), np.int32)}


def first(dtype=np.float32):
    rng = np.random.default_rng(100)
    return {"w": rng.normal(size=WIDTH).astype(dtype), "v": rng.normal(size=1).astype(dtype)}


def trained(revisions, l2_start=0.0, poisoned=(), weights=None):
    """The states after each step, on the host; a step of `poisoned` has a row that is no number."""
    optimizer, weights = make_optimizer(CONFIG, SCHEDULE), first() if weights is None else weights
    step = jax.jit(
        make_train_step(
            Linear, squares, optimizer, SCHEDULE, REPLICATED, 1, revisions=revisions, l2_start=l2_start,
            perturb=lambda params, key: params,
        )
    )  # fmt: skip
    found = []
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        state = init_state(jax.tree.map(jnp.asarray, weights), optimizer, revisions)
        found.append(jax.device_get(state))
        for number in range(STEPS):
            batch = rows(number)
            if number in poisoned:
                batch["tokens"][3] = np.nan
            state, _ = step(state, {"w": None, "v": None}, jax.tree.map(jnp.asarray, batch))
            found.append(jax.device_get(state))
    return found


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_that_of_numpy(decay):
    states = trained((follow_average(decay),))
    own = {name: value.astype(np.float64) for name, value in states[0].trainable.items()}
    for number, state in enumerate(states[1:]):
        d = min(decay, (1 + number) / (10 + number))
        own = {name: d * value + (1 - d) * state.trainable[name] for name, value in own.items()}
        for name, value in own.items():
            np.testing.assert_allclose(state.average[name], value, rtol=1e-5, atol=1e-7)
    assert np.abs(states[-1].average["w"] - states[-1].trainable["w"]).max() > 1e-3


def test_a_step_that_is_left_out_leaves_the_average():
    states = trained((follow_average(0.9), skip_bad_steps(SCHEDULE)), poisoned=(7,))
    for name, value in states[7].average.items():
        np.testing.assert_array_equal(states[8].average[name], value)
        assert (states[9].average[name] != value).any() and np.isfinite(states[-1].average[name]).all()


def test_the_average_of_bfloat16_weights_is_float32():
    weights = jax.tree.map(lambda own: jnp.asarray(own, jnp.bfloat16), first())
    states = trained((follow_average(0.999),), weights=weights)
    assert states[-1].trainable["w"].dtype == jnp.bfloat16 and states[-1].average["w"].dtype == np.float32


@pytest.mark.parametrize("l2_start", [0.0, 0.3])
def test_the_pull_towards_the_start_is_that_of_torch(l2_start):
    """L2-SP beside a decay towards zero: torch's AdamW on the mean loss and half the squared distance, in float64."""
    start = {name: torch.tensor(value) for name, value in first(np.float64).items()}
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    states = trained((remember_start(),), l2_start=l2_start)
    for number, state in enumerate(states[1:]):
        x = torch.tensor(rows(number)["tokens"], dtype=torch.float64)
        loss = (x @ weights["w"] + weights["v"] - 1).square().sum() / ROWS
        distance = sum((weights[name] - start[name]).square().sum() for name in start) / 2
        optimizer.zero_grad()
        (loss + l2_start * distance).backward()
        optimizer.step()
        for name, own in weights.items():
            np.testing.assert_allclose(state.trainable[name], own.detach(), rtol=2e-5, atol=2e-5)
            np.testing.assert_array_equal(state.start[name], first()[name])
