"""Every method in the train step: what moves and what stays, on one device as on eight, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmtune.config import AdamW
from llmtune.models.config import Experts, ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.optimizers import make_optimizer, make_schedule
from llmtune.sharding import REPLICATED, load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.training.remat import POLICIES
from llmtune.training.state import init_state
from llmtune.training.step import make_train_step
from llmtune.transforms import (
    build,
    chain,
    combine,
    dora,
    full,
    ia3,
    identity,
    lora,
    olora,
    partition,
    pissa,
    quantize,
    sequential_adapters,
    train_whole,
    vera,
)
from llmtune.weights import materialize, path_name, shardings
from tests.training.test_step import results_of_dots

DENSE = ModelConfig("LlamaForCausalLM", 64, 32, 64, 2, 4, 2, 8)
MIXTURE = ModelConfig(**{**vars(DENSE), "architecture": "MixtralForCausalLM", "experts": Experts(4, 2, 0.02)})
NF4 = quantize("nf4")
METHODS = {  # name -> (model, transform, the fields that train); every one begins as the model was
    "lora": (DENSE, lora(rank=4, alpha=8, dropout=0.1), {"a", "b"}),
    "lora in one layer, the ends too": (
        DENSE, lora(rank=4, alpha=8, targets=["q_proj", "embed_tokens", "lm_head"], layers=[1]), {"a", "b"}),
    "pissa": (DENSE, lora(rank=4, alpha=8, initial=pissa), {"a", "b"}),
    "dora": (DENSE, dora(rank=4, alpha=8, dropout=0.1), {"a", "b", "magnitude"}),
    "dora from olora": (DENSE, dora(rank=4, alpha=8, initial=olora, dropout=0.1), {"a", "b", "magnitude"}),
    "ia3": (DENSE, ia3(), {"gain"}),
    "vera": (DENSE, vera(rank=8, dropout=0.1), {"inner", "outer"}),
    "experts": (MIXTURE, lora(rank=4, alpha=8, targets=["attention", "experts"]), {"a", "b"}),
    "dora on experts": (MIXTURE, dora(rank=4, alpha=8, targets=["attention", "experts"]), {"a", "b", "magnitude"}),
    "vera on experts": (MIXTURE, vera(rank=8, targets="layers"), {"inner", "outer"}),
    "ia3 on experts": (MIXTURE, ia3(targets=["k_proj", "v_proj", "experts"]), {"gain"}),
    "houlsby on experts": (MIXTURE, sequential_adapters("houlsby", size=4), {"down", "down_bias", "up", "up_bias"}),
    "dora on experts in nf4": (
        MIXTURE, chain(NF4, dora(rank=4, alpha=8, targets="experts")), {"a", "b", "magnitude"}),
    "two at once": (
        DENSE, chain(lora(rank=2, alpha=4, targets="attention"), ia3(targets=["down_proj"]), train_whole(["norm/weight"])),
        {"a", "b", "gain", "weight"}),
}  # fmt: skip
BATCH, SEQ, STEPS = 8, 16, 2
MESHES = {
    "fsdp": {"fsdp": 8},
    "fsdp_torus": {"data": 2, "fsdp": 4},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "expert": {"fsdp": 4, "expert": 2},
    "expert_all_to_all": {"data": 2, "fsdp": 2, "expert": 2},
}
OF_EXPERTS = ("expert", "expert_all_to_all", "fsdp")


def setting(strategy):
    if strategy is None:
        return make_mesh({}, jax.devices()[:1]), REPLICATED
    mesh = make_mesh(MESHES[strategy])
    return mesh, load_strategy(strategy, configs_directory() / "strategies").on(mesh)


def rows_of_tokens():
    return np.random.default_rng(0).integers(0, 64, (BATCH, SEQ)).astype(np.int32)


def train(name, strategy=None, remat="block"):
    """(losses, initial params, trained params, trainable part, whether every array lies where it was declared)."""
    config, transform, _ = METHODS[name]
    graphdef, declared = declare(config)
    mesh, table = setting(strategy)
    with jax.set_mesh(mesh):
        draw = functools.partial(materialize, mesh=mesh, strategy=table)
        with table.active():
            base = draw(declared, jax.random.key(0))
            params = build(transform, base, draw(transform.init(declared), jax.random.key(1)))
        expected = shardings(transform.apply(declared, transform.init(declared)), mesh, table)
        placed = jax.tree.map(
            lambda array, layout: array.sharding.is_equivalent_to(layout, array.ndim), params, expected
        )
        trainable, frozen = partition(params, transform.trains)
        schedule = make_schedule(AdamW(warmup_steps=0, schedule="constant", learning_rate=1e-2), STEPS)
        optimizer = make_optimizer(AdamW(), schedule)
        bind = functools.partial(LanguageModel, graphdef, remat=POLICIES[remat], head_chunk=8)
        step = jax.jit(make_train_step(bind, next_token_loss, optimizer, schedule, table, 1, seed=5))
        tokens = rows_of_tokens()
        ones = np.ones_like(tokens)
        rows = {
            "tokens": tokens,
            "labels": tokens,
            "segment_ids": ones,
            "positions": ones.cumsum(1, dtype=np.int32) - 1,
        }
        batch = jax.device_put(rows, NamedSharding(mesh, table.spec("batch", "seq")))
        state, losses = init_state(trainable, optimizer), []
        for _ in range(STEPS):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        logits = None
        if strategy is None:
            rows = (batch[own] for own in ("tokens", "positions", "segment_ids"))
            logits = jax.device_get(jax.jit(lambda p, *rows: bind(p).logits(*rows))(params, *rows))
        moved = jax.device_get(combine(state.trainable, frozen))
        return losses, jax.device_get(params), moved, trainable, all(jax.tree.leaves(placed)), logits


@functools.cache
def on_one_device(name):
    return train(name)


@functools.cache
def plain_logits(config, base=identity):
    """Of the model without an adapter."""
    graphdef, declared = declare(config)
    mesh, table = setting(None)
    with jax.set_mesh(mesh):
        params = build(base, materialize(declared, jax.random.key(0), mesh, table), base.init(declared))
        tokens = jnp.asarray(rows_of_tokens())
        ones = jnp.ones_like(tokens)
        rows = (tokens, ones.cumsum(1, dtype=jnp.int32) - 1, ones)
        return jax.device_get(jax.jit(lambda p, *rows: LanguageModel(graphdef, p).logits(*rows))(params, *rows))


DEFAULT = ("dora", "experts")


@pytest.mark.parametrize(
    "name", [own if own in DEFAULT else pytest.param(own, marks=pytest.mark.nightly) for own in METHODS]
)
def test_adapters_move_and_all_else_is_bit_equal(name):
    config, _, fields = METHODS[name]
    losses, before, after, trainable, _, adapted = on_one_device(name)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(adapted, plain_logits(config, NF4 if "nf4" in name else identity), atol=2e-5)
    trains = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainable)}
    assert {path.rsplit("/", 1)[-1] for path in trains} == fields
    assert not [path for path in trains if "/base" in path]  # what was taken out of a weight stays, like the weight
    old, new = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (before, after))
    for path, value in old.items():
        if path_name(path) in trains:
            assert np.any(new[path] != value), path_name(path)
        else:
            np.testing.assert_array_equal(new[path], value, err_msg=path_name(path))


EIGHT = [("dora", "fsdp_tensor"), ("dora on experts", "expert")]
GRID = [(name, strategy) for name in METHODS for strategy in ("fsdp_torus", "fsdp_tensor")]
GRID += [(name, strategy) for name in METHODS if METHODS[name][0] is MIXTURE for strategy in OF_EXPERTS]


@pytest.mark.parametrize(
    ("name", "strategy"), EIGHT + [pytest.param(*pair, marks=pytest.mark.nightly) for pair in GRID if pair not in EIGHT]
)
def test_eight_devices_train_like_one(name, strategy):
    losses, _, _, _, placed, _ = train(name, strategy)
    assert placed
    np.testing.assert_allclose(losses, on_one_device(name)[0], rtol=1e-4)


# --- what a step costs --------------------------------------------------------------------------------------------


def dot_flops(jaxpr, times=1):
    """Floating-point operations of all products of a program, those of a scan's body counted as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * times * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        runs = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += dot_flops(inner, runs)
    return total


def is_program(parameter):
    return hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr")


WIDE = ModelConfig("LlamaForCausalLM", 256, 384, 1024, 4, 6, 2, 64)


def shapes(specs):
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def abstract(transform, remat):
    """(bind, the base's weights, trainable, frozen, batch): shapes alone."""
    graphdef, declared = declare(WIDE)
    trainable, frozen = partition(transform.apply(shapes(declared), shapes(transform.init(declared))), transform.trains)
    bind = functools.partial(LanguageModel, graphdef, remat=POLICIES[remat], head_chunk=512)
    rows = jax.ShapeDtypeStruct((2, 60), jnp.int32)
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), rows)
    return bind, shapes(declared), trainable, frozen, batch


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])), REPLICATED.active():
        yield


@pytest.mark.parametrize(
    ("kind", "remat", "low", "high"),
    [("lora", "none", 1.9, 2.2), ("lora", "block", 2.5, 3.2), ("full", "none", 2.8, 3.05)],
)
def test_products_of_a_step_in_forward_passes(one_device, kind, remat, low, high):
    transform = {"lora": lora(rank=8, alpha=16), "full": full}[kind]
    bind, base, trainable, frozen, batch = abstract(transform, remat)
    schedule = make_schedule(AdamW(), 10)
    optimizer = make_optimizer(AdamW(), schedule)
    step = make_train_step(bind, next_token_loss, optimizer, schedule, REPLICATED, 1)
    state = jax.eval_shape(lambda weights: init_state(weights, optimizer), trainable)
    whole = dot_flops(jax.make_jaxpr(step)(state, frozen, batch).jaxpr)
    rows = [batch[name] for name in ("tokens", "positions", "segment_ids")]
    forward = dot_flops(jax.make_jaxpr(lambda params, *rows: bind(params).logits(*rows))(base, *rows).jaxpr)
    assert low <= whole / forward <= high, whole / forward
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.shape]
    assert sorted(moments) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(state.trainable)])


@pytest.mark.parametrize(
    "transform",
    [dora(rank=8, alpha=16, dropout=0.1), vera(rank=8), ia3(), lora(rank=8, alpha=16, initial=pissa)],
    ids=["dora", "vera", "ia3", "pissa"],
)
def test_no_method_forms_the_gradient_of_a_frozen_weight(one_device, transform):
    """By shape: no product has the shape of a base matrix, or of its transpose."""
    matrices = {(384, 384), (384, 128), (384, 1024), (384, 256)}
    bind, _, trainable, frozen, batch = abstract(transform, "none")
    gradient = jax.make_jaxpr(lambda t, f, b: jax.grad(lambda t: next_token_loss(bind(combine(t, f)), b)[0])(t))
    dots = set(results_of_dots(gradient(trainable, frozen, batch).jaxpr))
    assert dots and not matrices & (dots | {shape[::-1] for shape in dots})
