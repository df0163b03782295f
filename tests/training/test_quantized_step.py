"""A QLoRA step as a program: what it multiplies, what it keeps for the backward pass, what its collectives carry."""

import functools
import math
import re

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
from llmtune.transforms import build, chain, combine, dora, full, lora, partition, quantize
from llmtune.weights import materialize

# multiples of 8 devices, and every matrix known by its shape; 3 layers
SMALL = ModelConfig("LlamaForCausalLM", 136, 64, 88, 3, 4, 2, 24)
MIXTURE = ModelConfig(**{**vars(SMALL), "architecture": "MixtralForCausalLM", "experts": Experts(4, 2, 0.01)})
WIDE = ModelConfig("LlamaForCausalLM", 512, 384, 1024, 2, 6, 2, 64)
MATRICES = {(64, 96), (64, 48), (96, 64), (64, 88), (88, 64)}
RANK = 8
REMATS = {**POLICIES, "a block that keeps what it likes": lambda block: block}


def step_and_arguments(config, transform, remat, devices=1, seq=16, batch=8):
    graphdef, declared = declare(config)
    mesh = make_mesh({"fsdp": -1}, jax.devices()[:devices])
    strategy = load_strategy("fsdp", configs_directory() / "strategies")
    draw = functools.partial(materialize, key=jax.random.key(0), mesh=mesh, strategy=strategy)
    schedule = make_schedule(AdamW(), 10)
    optimizer = make_optimizer(AdamW(), schedule)
    with jax.set_mesh(mesh):

        @jax.jit
        def make(params, additions):
            with strategy.active():
                return build(transform, params, additions)

        trainable, frozen = partition(make(draw(declared), draw(transform.init(declared))), transform.trains)
        state = init_state(trainable, optimizer)
    bind = functools.partial(LanguageModel, graphdef, remat=REMATS[remat], head_chunk=seq)
    step = make_train_step(bind, next_token_loss, optimizer, schedule, strategy, 1)
    layout = NamedSharding(mesh, strategy.spec("batch", "seq"))
    rows = jax.device_put(jnp.ones((batch, seq), jnp.int32), layout)
    return mesh, step, (state, frozen, dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), rows))


def qlora(base):
    return chain(quantize(base), lora(rank=RANK, alpha=16))


def equations(jaxpr, times=1):
    """(equation, how often it runs) of a program and of all programs inside."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner_times = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inner_times)


def traced(config, transform, remat, **options):
    mesh, step, arguments = step_and_arguments(config, transform, remat, **options)
    with jax.set_mesh(mesh):
        return list(equations(jax.make_jaxpr(step)(*arguments).jaxpr))


@pytest.mark.parametrize("remat", REMATS)
def test_no_dense_copy_of_a_quantised_stack_is_kept_and_no_frozen_gradient_formed(remat):
    program = traced(SMALL, qlora("nf4"), remat)
    stacks = {(SMALL.num_hidden_layers, *shape) for shape in MATRICES}
    kept = {
        tuple(out.aval.shape) for e, _ in program for out in e.outvars if jnp.issubdtype(out.aval.dtype, jnp.floating)
    }
    assert not kept & stacks
    dots = {tuple(e.outvars[0].aval.shape) for e, _ in program if e.primitive.name == "dot_general"}
    assert not {shape for shape in dots if shape in MATRICES or shape[::-1] in MATRICES}


def dot_flops(program):
    total = 0
    for equation, times in program:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                times * 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            )
    return total


@pytest.mark.parametrize("transform", [lora(rank=RANK, alpha=16), qlora("nf4")], ids=["lora", "qlora"])
def test_flops_beside_those_of_the_forward_pass(transform):
    """remat none: 2.2 times forward, block remat 3.2 times; full fine-tuning 3 times."""
    mesh, _, (state, frozen, batch) = step_and_arguments(WIDE, transform, "none", seq=128)

    def forward(trainable, frozen, batch):
        model = LanguageModel(declare(WIDE)[0], combine(trainable, frozen), head_chunk=128)
        return model.logits(batch["tokens"], batch["positions"], batch["segment_ids"])

    with jax.set_mesh(mesh):
        once = dot_flops(equations(jax.make_jaxpr(forward)(state.trainable, frozen, batch).jaxpr))
    ratios = {r: dot_flops(traced(WIDE, transform, r, seq=128)) / once for r in ("none", "block")}
    assert ratios["none"] <= 2.2 and ratios["block"] <= 3.2, ratios


def test_full_fine_tuning_takes_more():
    small = dot_flops(traced(WIDE, lora(rank=RANK, alpha=16), "none", seq=128))
    assert dot_flops(traced(WIDE, full, "none", seq=128)) > 1.3 * small


def gathered_on_eight_devices(config, transform):
    """{(dtype, shape)} of the all-gathers of a step."""
    mesh, step, arguments = step_and_arguments(config, transform, "block", devices=8)
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(*arguments).compile().as_text()
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return {(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found if shape}


@pytest.mark.nightly
@pytest.mark.parametrize("method", [lora, dora])
def test_fully_sharded_training_gathers_the_codes_of_experts(method):
    """Those that DoRA's lengths are taken through among them."""
    transform = chain(quantize("nf4"), method(rank=RANK, alpha=16, targets="experts"))
    rows = gathered_on_eight_devices(MIXTURE, transform)
    matrices = {shape for n_in, n_out in ((64, 88), (88, 64)) for shape in ((4, n_in, n_out), (n_in, n_out))}
    assert not {s for dtype, s in rows if dtype in ("f32", "bf16") and tuple(d for d in s if d > 1) in matrices}, rows
    assert max(math.prod(shape) for dtype, shape in rows if dtype == "u8") >= 4 * 64 * 88 // 2


@pytest.mark.parametrize("base", ["nf4", pytest.param("int8", marks=pytest.mark.nightly)])
def test_fully_sharded_training_gathers_codes(base):
    """On eight devices: every all-gather of a quantised matrix is one of bytes, none of floats as large as a matrix."""
    rows = gathered_on_eight_devices(SMALL, qlora(base))
    assert rows
    smallest = min(math.prod(shape) for shape in MATRICES)
    # one layer's matrix; the head and the embedding are not quantised, and the rows of a batch have 8 x 16 tokens
    plain = {(136, 64), (64, 136)}
    floats = {s for dtype, s in rows if dtype in ("f32", "bf16") and tuple(d for d in s if d > 1) not in plain}
    assert not {shape for shape in floats if tuple(d for d in shape if d > 1) in MATRICES}, floats
    codes = [math.prod(shape) for dtype, shape in rows if dtype in ("u8", "s8")]
    assert max(codes) >= smallest // 2


@pytest.mark.nightly
def test_adapters_on_quantised_experts_spread_over_devices():
    """Each of eight devices holds some experts' codes: the logits of one device."""
    config = ModelConfig("MixtralForCausalLM", 128, 64, 96, 2, 4, 4, 16, experts=Experts(4, 2, 0.01))
    graphdef, declared = declare(config)
    transform = chain(quantize("nf4"), lora(rank=4, alpha=8, targets=["attention", "experts"]))
    expert = load_strategy("expert", configs_directory() / "strategies")

    def logits(strategy, sizes, devices):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        draw = functools.partial(materialize, key=jax.random.key(0), mesh=mesh, strategy=strategy)

        def forward(params, additions, ids):
            with strategy.active():
                model = LanguageModel(graphdef, build(transform, params, additions))
                return model.logits(ids, jnp.ones_like(ids), jnp.ones_like(ids))

        with jax.set_mesh(mesh):
            rows = jnp.arange(64, dtype=jnp.int32).reshape(4, 16)
            ids = jax.device_put(rows, NamedSharding(mesh, strategy.spec("batch", "seq")))
            return jax.device_get(jax.jit(forward)(draw(declared), draw(transform.init(declared)), ids))

    np.testing.assert_allclose(logits(expert, {"fsdp": 2, "expert": 4}, 8), logits(REPLICATED, {}, 1), atol=1e-5)
