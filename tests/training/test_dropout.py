"""What dropout drops in training follows from (seed, step, microbatch), and from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmtune.sharding import REPLICATED, make_mesh
from llmtune.training.state import init_state
from llmtune.training.step import make_train_step
from llmtune.transforms import adapters, partition
from llmtune.weights import LoRA, linear


def losses(seed, microbatches=1, rate=0.5, steps=3):
    """Of a model that is one adapted matrix and does not learn, on rows that are all the same."""
    draw = lambda *shape: jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)  # noqa: E731
    weight = LoRA(draw(6, 4), draw(6, 2), draw(2, 4), jnp.ones(()), dropout=rate)

    def objective(model, batch):
        x = jnp.broadcast_to(jnp.arange(6.0), (*batch["tokens"].shape, 6))
        out = linear(x, model["q"], ("batch", "seq", "act_mlp"))
        return jnp.square(out).sum(), jnp.float32(batch["tokens"].size), {}

    trainable, frozen = partition({"q": weight}, adapters)
    optimizer = optax.sgd(0.0)
    arguments = (optimizer, lambda step: 0.0, REPLICATED, microbatches, seed)
    step = jax.jit(make_train_step(lambda params: params, objective, *arguments))
    state, found = init_state(trainable, optimizer), []
    batch = dict.fromkeys(("tokens", "segment_ids"), jnp.ones((4, 8), jnp.int32))
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics["loss"]))
    return found


def test_every_step_drops_anew_and_the_same_run_drops_the_same():
    one = losses(seed=0)
    assert len(set(one)) == 3
    assert losses(seed=0) == one and not set(losses(seed=1)) & set(one)
    assert len(set(losses(seed=0, rate=0.0))) == 1


def test_microbatches_drop_apart():
    halves = losses(seed=0, microbatches=2, steps=1)
    assert halves != losses(seed=0, steps=1)
    assert halves == pytest.approx(losses(seed=0, steps=1), rel=0.5)
