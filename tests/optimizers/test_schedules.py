"""Schedules against transformers', and what all of them promise: warmup from 0, never below the floor."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers.optimization as theirs

from llmtune.config import AdamW
from llmtune.optimizers import make_schedule

STEPS, WARMUP, PEAK = 60, 7, 3e-3
PEERS = {
    "constant": (1.0, functools.partial(theirs.get_constant_schedule_with_warmup, num_warmup_steps=WARMUP)),
    "linear": (0.0, functools.partial(theirs.get_linear_schedule_with_warmup, num_warmup_steps=WARMUP,
               num_training_steps=STEPS)),
    "cosine": (0.1, functools.partial(theirs.get_cosine_with_min_lr_schedule_with_warmup, num_warmup_steps=WARMUP,
               num_training_steps=STEPS, min_lr_rate=0.1)),
    "wsd": (0.1, functools.partial(theirs.get_wsd_schedule, num_warmup_steps=WARMUP, num_decay_steps=12,
            num_training_steps=STEPS, decay_type="linear", min_lr_ratio=0.1)),
    "polynomial": (0.1, functools.partial(theirs.get_polynomial_decay_schedule_with_warmup, num_warmup_steps=WARMUP,
                   num_training_steps=STEPS, lr_end=0.1 * PEAK, power=2.0)),
    "inverse_sqrt": (0.0, functools.partial(theirs.get_inverse_sqrt_schedule, num_warmup_steps=WARMUP)),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_a_schedule_is_that_of_transformers(name):
    floor, make = PEERS[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, expected = make(optimizer), []
    for _ in range(STEPS):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    config = AdamW(learning_rate=PEAK, schedule=name, warmup_steps=WARMUP, final_fraction=floor, decay_fraction=0.2)
    ours = make_schedule(config, STEPS)(jnp.arange(STEPS))
    np.testing.assert_allclose(ours[WARMUP:], expected[WARMUP:], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(
        ours[:WARMUP], PEAK * np.arange(WARMUP) / WARMUP, rtol=1e-5
    )  # wsd there begins at its floor


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("warmup", [0, 5, 200])
def test_no_schedule_leaves_what_is_between_floor_and_peak(name, warmup):
    config = AdamW(learning_rate=PEAK, schedule=name, warmup_steps=warmup, final_fraction=0.3)
    rates = np.array([make_schedule(config, 100)(jnp.int32(step)) for step in (*range(0, 120, 7), 10**6)])
    assert np.isfinite(rates).all() and rates.max() <= PEAK * (1 + 1e-6)
    after = rates[-1] if warmup < 100 else PEAK
    assert after >= 0.3 * PEAK * (1 - 1e-6)
