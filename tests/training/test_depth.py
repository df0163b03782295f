"""Neither the trace nor the compile time of a train step grows with the number of layers, patterns of windows included."""

import functools
import time

import jax
import jax.numpy as jnp
import pytest

from llmtune.config import AdamW
from llmtune.models.config import Experts, ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.optimizers import make_optimizer, make_schedule
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.training.remat import POLICIES
from llmtune.training.state import TrainState
from llmtune.training.step import make_train_step

KINDS = {
    "dense": {},
    "interleaved": {"windows": (None, 32, 32, 32)},
    "experts": {"experts": Experts(4, 2, 0.01)},
}
BATCH, SEQ = 2, 64


def lowered_step(kind, layers):
    """(step, abstract arguments) of full fine-tuning."""
    config = ModelConfig("LlamaForCausalLM", 256, 64, 96, layers, 4, 2, 16, **KINDS[kind])
    graphdef, declared = declare(config)
    trainable = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), declared)
    schedule = make_schedule(AdamW(), 10)
    optimizer = make_optimizer(AdamW(), schedule)
    bind = functools.partial(LanguageModel, graphdef, remat=POLICIES["block"])
    step = make_train_step(bind, next_token_loss, optimizer, schedule, REPLICATED, 1)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimizer.init, trainable))
    rows = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32)
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), rows)
    frozen = jax.tree.map(lambda _: None, trainable)
    return step, (state, frozen, batch)


def count_equations(jaxpr):
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            total += count_equations(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_trace_is_as_long_for_eighty_layers_as_for_eight(kind):
    counts = []
    for layers in (8, 80):
        step, arguments = lowered_step(kind, layers)
        with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
            counts.append(count_equations(jax.make_jaxpr(step)(*arguments).jaxpr))
    assert counts[0] == counts[1]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", list(KINDS))
def test_compile_time_of_eighty_layers_is_that_of_eight(kind, capsys):
    """The best of three, each compiled anew."""
    jax.config.update("jax_enable_compilation_cache", False)
    best = {}
    try:
        for _ in range(3):
            for layers in (8, 80):
                jax.clear_caches()
                step, arguments = lowered_step(kind, layers)
                with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
                    start = time.process_time()  # of this process: other work on the machine does not count
                    jax.jit(step, donate_argnums=0).lower(*arguments).compile()
                    best[layers] = min(best.get(layers, 1e9), time.process_time() - start)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    ratio = best[80] / best[8]
    with capsys.disabled():
        print(f"\n{kind}: 8 layers {best[8]:.2f} s, 80 layers {best[80]:.2f} s, ratio {ratio:.3f}")
    assert ratio <= 1.15
