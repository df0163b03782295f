"""Optimizers in whole runs on a real model: spread over devices, resumed, and 8-bit moments beside float32 ones."""

import jax
import numpy as np
import pytest

from llmtune.config.optimizers import OPTIMIZERS, AdamW, AdamW8bit
from llmtune.model import load
from llmtune.optimizers import make_optimizer
from tests.runs import curve, run_config, write_rows

RATES = {"lion": 1e-4, "sgd": 1e-1}
FLOAT32 = {"steps": 20, "batch_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def data(batches, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *batches)


def losses(tmp_path, stories, data, name, steps, devices, **sections):
    optimizer = {"name": name, "learning_rate": RATES.get(name, 1e-3), "warmup_steps": 2, "weight_decay": 0.1}
    run = run_config(
        tmp_path, stories, data, name=f"{name}{devices}", optimizer=optimizer, train={**FLOAT32, "steps": steps}, **sections
    )  # fmt: skip
    return curve(run, devices=devices)[0]


@pytest.mark.nightly
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_train_like_one_under_every_optimizer(stories, data, tmp_path, name):
    one = losses(tmp_path, stories, data, name, 5, 1)
    np.testing.assert_allclose(losses(tmp_path, stories, data, name, 5, 8), one, rtol=2e-5)
    assert one[-1] < one[0] or name == "adafactor"


def test_eight_bit_moments_end_within_a_hundredth_at_a_quarter_of_the_state(stories, data, tmp_path):
    plain, small = (losses(tmp_path, stories, data, name, 20, 1) for name in ("adamw", "adamw_8bit"))
    assert abs(small[-5:].mean() / plain[-5:].mean() - 1) < 0.01
    params = load(stories).params
    sizes = [
        sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(jax.eval_shape(make_optimizer(own, lambda count: 0.0).init, params))
        )
        for own in (AdamW(), AdamW8bit())
    ]
    assert sizes[1] < 0.265 * sizes[0]
