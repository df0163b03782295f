"""Layers that stay: the others train as they would beside them, and what lies below all that trains has no backward pass."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmtune.config import AdamW
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.optimizers import make_optimizer, make_schedule
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.training.state import init_state
from llmtune.training.step import make_train_step
from llmtune.transforms import partition
from tests.runs import curve, run_config, write_rows
from tests.training.test_methods import dot_flops

TRAIN = {"steps": 3, "batch_size": 4, "dtype": "float32"}
OPTIMIZER = {"learning_rate": 1e-3, "warmup_steps": 0, "clip_norm": None, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def rows(batches, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *batches)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.nightly)])
def test_frozen_layers_keep_their_bytes_and_the_others_train(stories, rows, tmp_path, devices):
    """Of 5 layers the second and the third stay. The first loss is that of the model, whatever is cut out of its stack."""

    def run(name, **adapt):
        adapt = {"method": "full", **adapt}
        return run_config(tmp_path, stories, rows, name, adapt=adapt, optimizer=OPTIMIZER, train=TRAIN)

    losses, _ = curve(run("cut", freeze_layers=[1, 2]), devices)
    np.testing.assert_allclose(losses[0], curve(run("all"), devices)[0][0], rtol=1e-6)
    before = load_file(stories / "model.safetensors")
    after = load_file(tmp_path / "cut/export/model/model.safetensors")
    assert set(before) == set(after)
    still = {name for name in before if np.array_equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith(("model.layers.1.", "model.layers.2."))}


def products_of_a_step(depths, trains):
    """Floating-point operations of a train step of a model with such stacks, where these paths train."""
    config = ModelConfig("LlamaForCausalLM", 256, 384, 1024, sum(depths), 6, 2, 64)
    graphdef, declared = declare(config, depths)
    arrays = jax.tree.map(lambda own: jax.ShapeDtypeStruct(own.shape, "float32"), declared)
    trainable, frozen = partition(arrays, lambda path, weight: path.startswith(trains))
    schedule = make_schedule(AdamW(), 10)
    optimizer = make_optimizer(AdamW(), schedule)
    bind = functools.partial(LanguageModel, graphdef)
    step = make_train_step(bind, next_token_loss, optimizer, schedule, REPLICATED, 1)
    state = jax.eval_shape(lambda weights: init_state(weights, optimizer), trainable)
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), jax.ShapeDtypeStruct((2, 60), "int32"))
    return dot_flops(jax.make_jaxpr(step)(state, frozen, batch).jaxpr)


def test_frozen_lowest_layers_have_no_backward_pass():
    """Two of four layers train: beyond a step that trains the last norm alone, twice the products of two layers forward."""
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        forward_of_two = products_of_a_step([2, 2], "norm") - products_of_a_step([2], "norm")
        upper, lower = (products_of_a_step([2, 2], f"layers/{n}/") - products_of_a_step([2, 2], "norm") for n in (1, 0))
    assert 1.9 < upper / forward_of_two < 2.2 < 2.8 < lower / forward_of_two, (upper, lower, forward_of_two)
