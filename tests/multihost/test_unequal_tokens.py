"""Two processes whose rows have very unequal numbers of targets: the gradient is that of one process, and of float64.

The gradient of a whole step is read from the momentum of its checkpoint, float32 as it was summed.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmtune
from checkpoints_convert.hf_names import tensors
from llmtune.training.checkpoint import arrays
from tests.multihost.together import together
from tests.parity.torch_training import token_loss
from tests.runs import run_config, write_rows

ROWS, SEQ = 16, 64
PIECES = [2, pytest.param(1, marks=pytest.mark.nightly), pytest.param(4, marks=pytest.mark.nightly)]


@pytest.fixture(scope="module")
def rows():
    """The second half, which is the second process's, has a few targets a row, two of its rows a single one."""
    tokens = np.random.default_rng(0).integers(5, 100, (1, ROWS, SEQ)).astype(np.int32)
    labels = tokens.copy()
    labels[:, ROWS // 2 :, :60] = -100
    labels[:, [9, 13], :-1] = -100
    return tokens, labels


@pytest.fixture(scope="module")
def exact(starter, rows):
    """By the names of files, float64: transformers in double."""
    model = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float64)
    token_loss(model, rows[0][0], rows[1][0]).backward()
    return {name: own.grad.numpy() for name, own in model.named_parameters()}


def gradient(directory, config):
    """By the names of files, of the first step."""
    path = Path(directory) / "checkpoints/1"
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(tuple(own["shape"]), jnp.dtype(own["dtype"]), sharding=one)
        for name, own in json.loads((path / "MANIFEST.json").read_text())["arrays"].items()
    }
    read = {name.split("/trace/")[-1]: own for name, own in arrays.read(path, like).items() if "/trace/" in name}
    found = {tensor.name: np.float64(read[tensor.path][tensor.index]) for tensor in tensors(config)}
    return {
        tensor.name: found[tensor.name].T if tensor.transposed else found[tensor.name] for tensor in tensors(config)
    }


def apart(one, other):
    """The norm of the difference in that of the gradient."""
    squares = [[np.square(a[name]).sum() for name in other] for a in ({n: one[n] - other[n] for n in other}, other)]
    return np.sqrt(sum(squares[0]) / sum(squares[1]))


@pytest.mark.parametrize("pieces", PIECES)
def test_two_processes_have_the_gradient_of_one(starter, rows, exact, pieces, tmp_path):
    data, config = write_rows(tmp_path / "rows.jsonl", *rows), llmtune.load(starter).config

    def configured(name, fsdp):
        return run_config(
            tmp_path, starter, data, name=name, sharding={"strategy": "fsdp", "mesh": {"fsdp": fsdp}},
            train={"steps": 1, "batch_size": ROWS, "microbatches": pieces, "dtype": "float32"},
            optimizer={"name": "sgd", "momentum": 0.9, "learning_rate": 1e-3, "warmup_steps": 0, "clip_norm": None},
        )  # fmt: skip

    found = {}
    for name, devices in (("one", 1), ("two devices", 2)):
        llmtune.train(configured(name, devices), devices=jax.devices()[:devices])
        found[name] = gradient(tmp_path / name, config)
    configured("two", 2)
    together(tmp_path, [tmp_path / "two.yaml"], processes=2, devices=1)
    found["two"] = gradient(tmp_path / "two", config)

    assert apart(found["two"], found["two devices"]) < 1e-6  # how devices are dealt to processes changes nothing
    # cutting a batch changes the products' shapes, and so their rounding: 1.7e-6 of the head's product towards the hidden
    # states alone, whose terms cancel. What two processes sum is as near to the truth as what one does
    errors = {name: apart(own, exact) for name, own in found.items()}
    assert errors["two"] < 4e-6 and errors["two"] < 1.2 * errors["one"], errors
