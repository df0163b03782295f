"""Every strategy on eight simulated devices: the curve of one device, golden collectives, and nothing replicated on the quiet.

dense, windowed, Mixtral   x   full, LoRA, QLoRA   x   ddp, zero1, fsdp, ...        all by night, each pair of two by day
"""

import collections
import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from llmtune.config import Sharding
from llmtune.config.file import build_run
from llmtune.models.config import Experts, ModelConfig
from llmtune.models.decoder import declare
from llmtune.sharding import REPLICATED, axis_size, make_mesh, put
from llmtune.training.program import assemble
from llmtune.training.state import init_state
from llmtune.training.state_layout import state_layouts
from llmtune.training.weights import Weights, choose_layout
from llmtune.transforms import build, chain, full, lora, partition, quantize
from llmtune.weights import ArraySpec, materialize, path_name, shardings

STEPS, BATCH, SEQ, VOCAB = 20, 8, 64, 160
DENSE = ModelConfig("LlamaForCausalLM", VOCAB, 64, 128, 2, 4, 4, 16)
MODELS = {
    "dense": DENSE,
    "windowed": dataclasses.replace(DENSE, architecture="MistralForCausalLM", windows=(24,)),
    "mixtral": dataclasses.replace(DENSE, architecture="MixtralForCausalLM", experts=Experts(4, 2, 0.02)),
}
LOW_RANK = functools.partial(lora, rank=4, alpha=8)
TRANSFORMS = {
    "full": lambda targets: full,
    "lora": lambda targets: LOW_RANK(targets=targets),
    "qlora": lambda targets: chain(quantize("nf4", targets=targets), LOW_RANK(targets=targets)),
}
MESHES = {
    "ddp": {"data": 8}, "zero1": {"data": 8}, "fsdp": {"fsdp": 8}, "fsdp_torus": {"data": 2, "fsdp": 4},
    "hsdp": {"replica": 2, "fsdp": 4}, "tensor": {"data": 2, "tensor": 4}, "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "sequence": {"fsdp": 2, "tensor": 4}, "context": {"fsdp": 2, "context": 4}, "expert": {"fsdp": 2, "expert": 4},
    "expert_all_to_all": {"data": 2, "fsdp": 2, "expert": 2}, "context_expert": {"fsdp": 2, "context": 2, "expert": 2},
}  # fmt: skip
COMBINATIONS = [
    (strategy, model, method)
    for strategy, model, method in itertools.product(MESHES, MODELS, TRANSFORMS)
    if "expert" not in strategy or model == "mixtral"
]
BY_DAY = [
    ("ddp", "windowed", "lora"), ("zero1", "dense", "full"), ("fsdp", "mixtral", "qlora"), ("fsdp_torus", "dense", "full"),
    ("hsdp", "windowed", "full"), ("tensor", "windowed", "qlora"), ("fsdp_tensor", "mixtral", "full"),
    ("sequence", "dense", "lora"), ("context", "windowed", "full"), ("expert", "mixtral", "lora"),
    ("expert_all_to_all", "mixtral", "full"), ("context_expert", "mixtral", "lora"),
]  # fmt: skip


@functools.cache
def drawn(model, method):
    """Initial values of the model and of what the transform adds, on the host: drawn once, not anew for every mesh."""
    declared = declare(MODELS[model])[1]
    mesh = make_mesh({}, jax.devices()[:1])
    specs = (declared, TRANSFORMS[method](targets_of(model)).init(declared))
    with jax.set_mesh(mesh):
        return jax.device_get(materialize(specs, jax.random.key(0), mesh, REPLICATED))


def targets_of(model):
    return ["attention", "experts"] if model == "mixtral" else "all-linear"


@functools.cache
def trained(strategy, model, method):
    """(losses of 20 steps, HLO of the step, mesh, strategy, state, declared weights that train); strategy None: one device."""
    sizes = MESHES[strategy] if strategy else {}
    devices = jax.devices() if strategy else jax.devices()[:1]
    run = build_run(
        {"model": "-", "output": "-", "objective": "pretrain", "data": {"train": "-", "sequence_length": SEQ},
         "optimizer": {"learning_rate": 1e-3}, "train": {"steps": STEPS, "batch_size": BATCH, "dtype": "float32"}}, "grid",
    )  # fmt: skip
    graphdef, declared = declare(MODELS[model])
    transform = TRANSFORMS[method](targets_of(model))
    mesh, table = choose_layout(Sharding(strategy or "fsdp", sizes), declared, devices)
    rows = np.random.default_rng(0).integers(0, VOCAB, (STEPS, BATCH, SEQ)).astype(np.int32)
    segments = np.ones((BATCH, SEQ), np.int32)
    segments[:, 40:], segments[0, 60:] = 2, 0
    positions = np.tile(np.r_[:40, :24].astype(np.int32), (BATCH, 1))
    with jax.set_mesh(mesh):
        specs = (declared, transform.init(declared))
        params = build(transform, *jax.tree.map(put, drawn(model, method), shardings(specs, mesh, table)))
        adapted = transform.apply(declared, transform.init(declared))
        specs = partition(adapted, transform.trains)[0]
        trainable, frozen = partition(params, transform.trains)
        weights = Weights(graphdef, trainable, frozen, (), 0, state_layouts(specs, mesh, table))
        program, optimizer, revisions = assemble(run, weights, STEPS, mesh, table)
        state, losses = init_state(trainable, optimizer, revisions), []
        for number, tokens in enumerate(rows):
            batch = {"tokens": tokens, "labels": tokens, "segment_ids": segments, "positions": positions}
            placed = program.place(batch)
            if not number:
                step, _ = program.compile(state, placed)
            state, metrics = step(state, frozen, placed)
            losses.append(float(metrics["loss"]))
    return np.array(losses), step.as_text(), mesh, table, state, specs


def by_night(combinations):
    return [pytest.param(*own, marks=() if own in BY_DAY else pytest.mark.nightly) for own in combinations]


@pytest.mark.parametrize(("strategy", "model", "method"), by_night(COMBINATIONS))
def test_the_curve_is_that_of_one_device(strategy, model, method):
    np.testing.assert_allclose(trained(strategy, model, method)[0], trained(None, model, method)[0], rtol=1e-5)


@pytest.mark.parametrize(("strategy", "model", "method"), BY_DAY)
def test_what_the_table_splits_is_split(strategy, model, method):
    """Weights and, of those that train, moments: each device holds what the table says, to the element."""
    _, _, mesh, table, state, specs = trained(strategy, model, method)
    declared = dict(leaves(specs, lambda leaf: isinstance(leaf, ArraySpec)))
    arrays = dict(leaves(state.trainable))
    assert arrays.keys() == declared.keys()
    for path, array in arrays.items():
        assert held(array) == array.size // ways(mesh, table.spec(*declared[path].axes)), path
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    most = sum(array.size // ways(mesh, table.spec(*declared[path].axes)) for path, array in arrays.items())
    assert sum(map(held, moments)) <= 2 * most
    if strategy == "zero1":
        assert sum(map(held, moments)) < 2 * most / 4  # all but norms over eight devices


def leaves(tree, is_leaf=None):
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]


def held(array):
    return array.addressable_shards[0].data.size


def ways(mesh, spec):
    return int(np.prod([axis_size(mesh, part) for part in spec]))


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
GOLDEN = json.loads((Path(__file__).parent / "collectives.json").read_text())


@pytest.mark.parametrize(("strategy", "model", "method"), BY_DAY)
def test_the_collectives_are_those_that_are_on_record(strategy, model, method):
    """Instructions of the step as this machine's compiler leaves it; those of a scan's body stand once."""
    found = collections.Counter(re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", trained(strategy, model, method)[1]))
    assert dict(found) == GOLDEN[f"{strategy}, {model}, {method}"]
