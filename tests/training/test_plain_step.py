"""The plain step with nothing switched on: AdamW to the bit, the same program, and no state beside the optimizer's."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmtune.config import AdamW
from llmtune.optimizers import make_optimizer, make_schedule
from llmtune.sharding import REPLICATED
from llmtune.training.guard import skip_bad_steps
from llmtune.training.norms import norms_by_part
from llmtune.training.state import init_state
from llmtune.training.step import make_train_step

CONFIG = AdamW(weight_decay=0.1, warmup_steps=3)
SCHEDULE = make_schedule(CONFIG, 20)
WEIGHTS = {
    "layers": [{"mlp": {"up": {"kernel": jnp.linspace(-1, 1, 3 * 8 * 4).reshape(3, 8, 4)}}}],
    "norm": jnp.ones(4),
}
FROZEN = jax.tree.map(lambda leaf: None, WEIGHTS)


def objective(weights, batch):
    x = jnp.sin(batch["tokens"].astype(jnp.float32))
    hidden = jnp.einsum("bs,lsd->bd", x, weights["layers"][0]["mlp"]["up"]["kernel"]) * weights["norm"]
    return jnp.square(hidden - 0.3).sum(), jnp.float32(x.shape[0]), {}


def batch_of(number):
    tokens = jnp.asarray(np.random.default_rng(number).integers(0, 50, (5, 8)), jnp.int32)
    return {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}


def by_hand(optimizer):
    """The step written out with optax alone."""

    def step(trainable, opt_state, count, batch):
        def sums(weights):
            loss, weight, _ = objective(weights, batch)
            return loss, weight

        (loss, weight), grads = jax.value_and_grad(sums, has_aux=True)(trainable)
        total = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g / total, grads)
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        norms = {"grad_norm": optax.tree.norm(grads), **norms_by_part(grads)}
        return optax.apply_updates(trainable, updates), opt_state, loss / total, norms

    return step


def plain(revisions=()):
    optimizer = make_optimizer(CONFIG, SCHEDULE)
    step = make_train_step(lambda weights: weights, objective, optimizer, SCHEDULE, REPLICATED, 1, revisions=revisions)
    return step, init_state(jax.tree.map(jnp.copy, WEIGHTS), optimizer, revisions)


def optax_alone():
    own = optax.adamw(SCHEDULE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), own)


def test_the_plain_step_is_adamw_to_the_bit():
    optimizer = optax_alone()
    theirs = jax.jit(by_hand(optimizer))
    for revisions in ((), (skip_bad_steps(SCHEDULE),)):  # what a run does by default changes no bit either
        step, state = plain(revisions)
        trainable, opt_state = WEIGHTS, optimizer.init(WEIGHTS)
        for number in range(20):
            state, metrics = jax.jit(step)(state, FROZEN, batch_of(number))
            trainable, opt_state, loss, _ = theirs(trainable, opt_state, number, batch_of(number))
            assert float(metrics["loss"]) == float(loss)
        for ours, own in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(trainable), strict=True):
            np.testing.assert_array_equal(ours, own)


def test_the_plain_step_carries_no_more_than_adamw_does():
    _, state = plain()
    alone = optax_alone().init(WEIGHTS)
    assert len(jax.tree.leaves(state)) == 1 + len(jax.tree.leaves(WEIGHTS)) + len(jax.tree.leaves(alone))
    guarded = plain((skip_bad_steps(SCHEDULE),))[1]
    assert jax.tree.structure(guarded) == jax.tree.structure(state)


def test_the_plain_step_is_the_program_written_by_hand():
    """The same operations, as many of each, in the compiled module."""
    step, state = plain()
    batch = batch_of(0)

    def ours(trainable, opt_state, count, batch):
        after, metrics = step(state.__class__(count, trainable, opt_state), FROZEN, batch)
        norms = {name: own for name, own in metrics.items() if name.startswith("grad_norm")}
        return after.trainable, after.opt_state, metrics["loss"], norms

    arguments = (WEIGHTS, state.opt_state, state.step, batch)
    texts = [
        jax.jit(f).lower(*arguments).compile().as_text() for f in (ours, by_hand(make_optimizer(CONFIG, SCHEDULE)))
    ]
    assert operations(texts[0]) == operations(texts[1])


def operations(text):
    """How often each kind of operation stands in a compiled module."""
    kinds = re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = .*?[\]})] ([a-z][\w-]*)\(", text, flags=re.M)
    return Counter(kind for kind in kinds if kind not in ("parameter", "tuple", "get-tuple-element"))
