"""The train step as a program: compiled once, and without a single product for a frozen weight's gradient."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

import llmtune
from llmtune.config import AdamW
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.optimizers import make_optimizer, make_schedule
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.training.remat import POLICIES
from llmtune.training.state import init_state
from llmtune.training.step import make_train_step
from llmtune.transforms import adapters, everything, identity, lora, partition
from llmtune.weights import materialize
from tests.runs import LORA_BY_DAY, run_config

# every size is a different prime times two, so that a matrix is known by its shape
CONFIG = ModelConfig("LlamaForCausalLM", 2 * 53, 2 * 11, 2 * 31, 2, 2, 1, 2 * 7)
FROZEN = {(22, 28), (22, 14), (28, 22), (22, 62), (62, 22), (106, 22), (22, 106)}
BATCH, SEQ, RANK = 3, 17, 5


def step_and_arguments(transform, trains, remat="none", tied=False):
    config = ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    graphdef, declared = declare(config)
    mesh = make_mesh({}, jax.devices()[:1])
    draw = functools.partial(materialize, key=jax.random.key(0), mesh=mesh, strategy=REPLICATED)
    params = transform.apply(draw(declared), draw(transform.init(declared)))
    trainable, frozen = partition(params, trains)
    schedule = make_schedule(AdamW(), 10)
    optimizer = make_optimizer(AdamW(), schedule)
    bind = functools.partial(LanguageModel, graphdef, remat=POLICIES[remat], head_chunk=8)
    step = make_train_step(bind, next_token_loss, optimizer, schedule, REPLICATED, 1)
    ones = jnp.ones((BATCH, SEQ), jnp.int32)
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), ones)
    return mesh, step, (init_state(trainable, optimizer), frozen, batch)


def results_of_dots(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(equation.outvars[0].aval.shape)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from results_of_dots(inner)


def weight_gradients(transform, trains, remat="none", tied=False):
    mesh, step, arguments = step_and_arguments(transform, trains, remat, tied)
    with jax.set_mesh(mesh):
        dots = set(results_of_dots(jax.make_jaxpr(step)(*arguments).jaxpr))
    return {shape for shape in dots if shape in FROZEN or shape[::-1] in FROZEN}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_no_product_yields_the_gradient_of_a_frozen_weight(remat, tied):
    assert not weight_gradients(lora(rank=RANK, alpha=8), adapters, remat, tied)


def test_full_fine_tuning_does_have_such_products():
    assert len(weight_gradients(identity, everything)) >= 5  # else the test above would see nothing


@pytest.mark.parametrize("remat", [policy for policy in POLICIES if policy != "none"])
def test_rematerialisation_changes_no_number(remat):
    results = []
    for policy in ("none", remat):
        mesh, step, arguments = step_and_arguments(identity, everything, policy)
        with jax.set_mesh(mesh):
            _, metrics = jax.jit(step)(*arguments)
        results.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("adapt", LORA_BY_DAY)
def test_one_compile_per_run(stories, assets, tmp_path, caplog, adapt):
    """Ragged real text, packed, a last batch that is not full, evaluation in between: still one train and one loss step."""
    text = (assets / "data" / "tinyshakespeare.txt").read_text()
    files = {"train.txt": text[:30_000], "validation.txt": text[40_000:47_000]}
    for name, part in files.items():
        (tmp_path / name).write_text(part)
    run = run_config(
        tmp_path, stories, None, adapt=adapt, objective="pretrain",
        data={"train": str(tmp_path / "train.txt"), "validation": str(tmp_path / "validation.txt"), "sequence_length": 128},
        train={"epochs": 1.5, "batch_size": 8}, evaluate={"every": 4}, checkpoint={"every": 5},
    )  # fmt: skip
    jax.config.update("jax_log_compiles", True)
    jax.config.update("jax_enable_compilation_cache", False)  # of the test suite: it would hide a compilation
    try:
        with caplog.at_level(logging.WARNING):
            llmtune.train(run, devices=jax.devices()[:1])
    finally:
        jax.config.update("jax_log_compiles", False)
        jax.config.update("jax_enable_compilation_cache", True)
    compiled = [
        record.getMessage()
        for record in caplog.records
        if "Finished jaxpr to MLIR module conversion jit(step)" in record.getMessage()
    ]
    assert len(compiled) == 2, compiled


def test_sixteen_bit_compute_keeps_float32_masters_and_the_frozen_base_as_stored():
    mesh, step, (state, frozen, batch) = step_and_arguments(lora(rank=RANK, alpha=8), adapters)
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, frozen)
    with jax.set_mesh(mesh):
        after, _ = jax.jit(step)(state, frozen, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.trainable)} == {jnp.dtype("float32")}
    moments = [leaf.dtype for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim > 0]
    assert set(moments) == {jnp.dtype("float32")}
