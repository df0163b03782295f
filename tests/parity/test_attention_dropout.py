"""Training with attention dropout against transformers in train mode, its dropout told to leave out what ours does."""

import functools

import jax
import jax.numpy as jnp
import pytest
import torch

import llmtune
from llmtune.kernels import draw_attention_dropout
from tests.kernels.test_attention_dropout import all_factors
from tests.parity.reference import load_reference, save_model
from tests.parity.test_gradients import (
    CHOSEN,
    SIZES,
    assert_same_gradients,
    batch_of,
    our_step,
    their_gradients,
    their_step,
)

RATE = 0.25
NAMES = [pytest.param(name, marks=[] if name in ("tied", "ministral, interleaved windows") else pytest.mark.nightly)
         for name in CHOSEN]  # fmt: skip


def dropping_like_ours(monkeypatch, config, batch, dropout):
    """torch's dropout, which transformers calls once a layer on [batch, heads, query, key], drops by our places."""
    period, calls = len(config.windows), iter(range(config.num_hidden_layers))
    rows, seq = batch["tokens"].shape

    def drop(weights, p=0.5, training=True, inplace=False):
        assert training and p == RATE and weights.shape == (rows, config.num_attention_heads, seq, seq)
        layer = next(calls)
        factors = all_factors(rows, config.num_attention_heads, seq, dropout.of_layer(layer % period, layer // period))
        return weights * torch.tensor(factors)

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    return calls


@pytest.mark.parametrize("strategy", [None, "fsdp", pytest.param("tensor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient(name, strategy, tmp_path, monkeypatch):
    save_model(name, tmp_path, attention_dropout=RATE, **(SIZES if strategy else {}))
    model, reference = llmtune.load(tmp_path, strategy=strategy), load_reference(tmp_path)
    assert model.config.attention_dropout == RATE
    reference.set_attn_implementation("eager")
    batch, dropout = batch_of(model.config.vocab_size), draw_attention_dropout(jax.random.key(5), RATE)
    calls = dropping_like_ours(monkeypatch, model.config, batch, dropout)
    out = their_step(reference.train(), batch)
    assert next(calls, None) is None

    step = functools.partial(our_step, batch=batch)
    with_slot = lambda params: model.bind({**params, "attention_dropout": dropout})  # noqa: E731
    loss, _, gradient = step(_Bound(model, with_slot))
    plain, _, _ = step(model)
    assert loss == pytest.approx(out.loss.item(), rel=1e-5) and abs(loss - plain) > 1e-4
    assert_same_gradients(model.config, gradient, their_gradients(reference))


class _Bound:
    """The model, its weights bound in another way."""

    def __init__(self, model, bind):
        self.strategy, self.mesh, self.params, self.bind = model.strategy, model.mesh, model.params, bind


def test_what_generates_and_evaluates_drops_nothing(tmp_path):
    save_model("tied", tmp_path, attention_dropout=0.9)
    model = llmtune.load(tmp_path)
    tokens = jnp.asarray(batch_of(model.config.vocab_size)["tokens"])[:1]
    ones = jnp.ones_like(tokens)
    with torch.inference_mode():
        theirs = load_reference(tmp_path)(torch.tensor(tokens.tolist())).logits.numpy()
    with jax.set_mesh(model.mesh):
        ours = model.bind(model.params).logits(tokens, jnp.cumsum(ones, axis=1) - 1, ones)
    assert abs(ours - theirs).max() < 1e-4
