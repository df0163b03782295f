"""Fifty updates of every optimizer against somebody else's, weight by weight: on stacks of layers, and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmtune.config.optimizers import SGD, Adafactor, AdamW, AdamW8bit, Lion, Muon, ScheduleFreeAdamW
from llmtune.optimizers import batch_axes, evaluated_weights, make_optimizer, make_schedule, updates_done
from llmtune.sharding import make_mesh
from tests.optimizers import references
from tests.optimizers.references import DECAY, RATE

STEPS = 50
WEIGHTS = {  # path -> (shape, layout on a mesh of fsdp 4, tensor 2)
    "layers/0/attention/q/kernel": ((3, 16, 256), (None, "fsdp", "tensor")),
    "layers/0/attention/o/kernel/a": ((3, 64, 4), (None, "fsdp", None)),
    "layers/0/mlp/experts/up/kernel": ((2, 4, 16, 256), (None, "fsdp", None, "tensor")),
    "layers/0/mlp_norm/weight": ((3, 16), (None, "fsdp")),
    "embed/table": ((64, 64), ("tensor", "fsdp")),
    "norm/weight": ((24,), (None,)),
}
PLAIN = {"learning_rate": RATE, "weight_decay": DECAY, "schedule": "constant", "warmup_steps": 0, "clip_norm": None}
CASES = {
    "adamw": (AdamW(**PLAIN), references.adamw, references.adamw),
    "adamw_8bit": (AdamW8bit(**PLAIN), references.adamw_8bit, references.adamw_8bit),
    "adafactor": (Adafactor(**PLAIN), references.adafactor(False), references.adafactor(False)),
    "adafactor by rms": (
        Adafactor(**PLAIN, scale_by_parameter=True), references.adafactor(True), references.adafactor(True),
    ),
    "lion": (Lion(**PLAIN), references.lion, references.lion),
    "muon": (Muon(**PLAIN), references.muon("match_rms_adamw"), references.adamw),
    "muon of Jordan": (Muon(**PLAIN, adjust="original"), references.muon("original"), references.adamw),
    "sgd": (SGD(**PLAIN, momentum=0.9, nesterov=True), references.sgd, references.sgd),
    "plain sgd": (SGD(**PLAIN), references.plain_sgd, references.plain_sgd),
}  # fmt: skip


def nested(by_path):
    tree = {}
    for path, leaf in by_path.items():
        *outer, last = path.split("/")
        functools.reduce(lambda below, part: below.setdefault(part, {}), outer, tree)[last] = leaf
    return tree


def drawn(seed, *leading):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=(*leading, *shape)).astype(np.float32) for path, (shape, _) in WEIGHTS.items()}


def train(config, devices):
    """(weights after fifty updates by path, those that would be evaluated, the optimizer's state)."""
    mesh = make_mesh({"fsdp": devices // 2 or 1, "tensor": min(devices, 2)}, jax.devices()[:devices])
    values, gradients = drawn(0), drawn(1, STEPS)
    layouts = {path: NamedSharding(mesh, PartitionSpec(*layout)) for path, (_, layout) in WEIGHTS.items()}
    schedule = make_schedule(config, STEPS)
    optimizer = make_optimizer(config, schedule)
    with jax.set_mesh(mesh):
        params = nested({path: jax.device_put(values[path], layouts[path]) for path in WEIGHTS})
        state = jax.jit(optimizer.init)(params)

        grads = nested({
            path: jax.device_put(gradients[path], NamedSharding(mesh, PartitionSpec(None, *WEIGHTS[path][1])))
            for path in WEIGHTS
        })  # fmt: skip

        def step(carried, grads):  # a scan asks that the state lies after a step as it did before
            params, state = carried
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.jit(lambda *carried: jax.lax.scan(step, carried, grads))(params, state)
        averages = evaluated_weights(config)(params, state)
    assert int(updates_done(state)) == STEPS

    def by_path(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}

    return by_path(params), by_path(averages), state


def expected(path, of_matrix, of_rest):
    """The reference, on every matrix or vector of the stack by itself."""
    values, gradients = drawn(0)[path], drawn(1, STEPS)[path]
    axes = batch_axes(path)
    single = values.shape[axes:]
    pairs = zip(values.reshape(-1, *single), np.moveaxis(gradients.reshape(STEPS, -1, *single), 0, 1), strict=True)
    reference = of_matrix if len(single) == 2 and path.startswith("layers") else of_rest
    return np.stack([np.asarray(reference(*pair)) for pair in pairs]).reshape(values.shape)


def agreed(ours, theirs, path, ties=0.0):
    """To 1e-5; `ties`: the share of elements that a moment in the middle between two codes may have sent another way."""
    apart = ~np.isclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert apart.mean() <= ties, (path, apart.mean(), np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours[apart], theirs[apart], atol=1e-3, err_msg=path)


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", CASES)
def test_fifty_updates_are_those_of_the_reference(name, devices):
    config, of_matrix, of_rest = CASES[name]
    weights, _, _ = train(config, devices)
    for path in WEIGHTS:
        agreed(weights[path], expected(path, of_matrix, of_rest), path, ties=0.001 if name == "adamw_8bit" else 0.0)


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_schedule_free_averages_as_the_paper_does(devices):
    config = ScheduleFreeAdamW(**{**PLAIN, "warmup_steps": 10})
    weights, averages, _ = train(config, devices)
    for path in WEIGHTS:
        for place, ours in enumerate((weights, averages)):
            theirs = expected(path, *(2 * [lambda *pair, place=place: references.schedule_free(*pair)[place]]))
            agreed(ours[path], theirs, path)


def test_eight_bit_moments_take_a_quarter_of_the_bytes():
    sizes = {}
    for config in (AdamW(), AdamW8bit()):
        params = nested({path: jnp.zeros(shape) for path, (shape, _) in WEIGHTS.items() if path.endswith("/kernel")})
        state = make_optimizer(config, lambda count: 0.0).init(params)
        sizes[config.name] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert sizes["adamw_8bit"] < 0.255 * sizes["adamw"]
