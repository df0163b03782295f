"""Terms of the loss against torch's, NEFTune's noise, averages and starts that are kept, runs that end by themselves."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llmtune
from llmtune.config.checkpoint import Best, Checkpoint
from llmtune.config.regularize import EarlyStopping
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.objectives.language_modeling import next_token_loss
from llmtune.objectives.regularized import regularized_loss
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.training.early_stopping import Plateau
from llmtune.weights import materialize
from llmtune.weights.noisy import with_noise
from tests.runs import curve, run_config, write_rows

CONFIG = ModelConfig("LlamaForCausalLM", 53, 16, 32, 2, 2, 1, 8, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model():
    """A small random model beside another one, and a batch with masked targets and padding."""
    graphdef, declared = declare(CONFIG)
    mesh = make_mesh({}, jax.devices()[:1])
    weights, others = (materialize(declared, jax.random.key(seed), mesh, REPLICATED) for seed in (0, 1))
    larger = jax.tree.map(lambda leaf: 5 * leaf, weights)
    bind = functools.partial(LanguageModel, graphdef, head_chunk=5)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 53, (3, 17)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 12:] = 0
    batch = {"tokens": tokens, "labels": np.where(rng.random(tokens.shape) < 0.7, tokens, -100).astype(np.int32)}
    batch |= {"segment_ids": segments, "positions": np.broadcast_to(np.arange(17, dtype=np.int32), tokens.shape)}
    with jax.set_mesh(mesh):
        yield dataclasses.replace(bind(larger), reference=bind(others)), {k: jnp.asarray(v) for k, v in batch.items()}


def by_torch(model, batch, smoothing, z, kl):
    """(sum over targets of all terms, their number), from whole logits in float64."""
    rows = (batch["tokens"], batch["positions"], batch["segment_ids"])
    ours, then = (
        torch.tensor(np.asarray(own.logits(*rows)), dtype=torch.float64)[:, :-1] for own in (model, model.reference)
    )
    targets = torch.tensor(np.asarray(batch["labels"])).long()[:, 1:]
    segments = torch.tensor(np.asarray(batch["segment_ids"]))
    counted = (targets != -100) & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    logits, before, targets = ours[counted], then[counted], targets[counted]
    loss = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    loss += z * torch.logsumexp(logits, -1).square().sum()
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum"
    )
    return float(loss + kl * divergence), int(counted.sum())


@pytest.mark.parametrize(
    ("smoothing", "z", "kl"), [(0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.0, 1e-2, 0.0), (0.0, 0.0, 0.5), (0.1, 1e-2, 0.5)]
)
def test_the_terms_of_the_loss_are_those_of_torch(model, smoothing, z, kl):
    own, batch = model
    loss, weight, figures = regularized_loss(own, batch, label_smoothing=smoothing, z_loss=z, kl_start=kl)
    expected, number = by_torch(own, batch, smoothing, z, kl)
    assert float(weight) == number and float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(figures["cross_entropy"]) == pytest.approx(float(next_token_loss(own, batch)[0]), rel=1e-6)


def test_without_terms_the_gradient_is_that_of_the_plain_loss(model):
    own, batch = model

    def gradient(objective):
        return jax.grad(lambda params: objective(dataclasses.replace(own, params=params), batch)[0])(own.params)

    for one, other in zip(
        jax.tree.leaves(gradient(regularized_loss)), jax.tree.leaves(gradient(next_token_loss)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_noise_on_embeddings_is_that_of_neftune(model):
    own, batch = model
    noisy = dataclasses.replace(own, params=with_noise(own.params, jax.random.key(3), alpha=5.0))
    ids = batch["tokens"]
    noise = np.asarray(noisy.decoder().embed(ids) - own.decoder().embed(ids))
    bound = 5.0 / np.sqrt(17 * 16)
    assert np.abs(noise).max() <= bound * (1 + 1e-5) and np.abs(noise).max() > 0.95 * bound
    assert np.abs(noise.mean()) < 0.05 * bound and noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    hidden = jnp.ones((1, 2, 16))
    np.testing.assert_array_equal(noisy.head_logits(hidden), own.head_logits(hidden))  # a tied head sees no noise


@pytest.mark.parametrize(
    ("values", "over"),
    [([3, 2, 1], False), ([1, 2, 3], True), ([3, 2.95, 2.93], True), ([3, 2.95, 2.8], False), ([1, 2], False),
     ([np.nan, 3, 2], False), ([3, np.nan, np.nan], True)],
)  # fmt: skip
def test_a_plateau_is_where_nothing_got_better(values, over):
    rule = EarlyStopping(patience=2, min_delta=0.1)
    rows = [{"step": n, "eval_loss": value} for n, value in enumerate(values)]
    assert Plateau(rule, rows).is_reached == over
    opposite = dataclasses.replace(rule, mode="max")
    assert Plateau(opposite, [{**row, "eval_loss": -row["eval_loss"]} for row in rows]).is_reached == over
    resumed = Plateau(rule, rows[:1])
    assert [resumed.see(row) for row in rows[1:]][-1] == over


def test_a_metric_that_is_none_is_named():
    with pytest.raises(llmtune.LlmtuneError, match=r"early_stopping.metric: 'los' is no figure.*there are step, loss"):
        Plateau(EarlyStopping(metric="los"), []).see({"step": 1, "loss": 2.0})


def test_what_comes_now_and_then_is_waited_for():
    """Held-out figures, and those of one source of a mixture, of which a batch may have none."""
    for metric in ("eval_loss", "loss/stories"):
        assert not Plateau(EarlyStopping(metric=metric, patience=1), []).see({"step": 1, "loss": 2.0})
    with pytest.raises(llmtune.LlmtuneError, match=r"early_stopping.metric: 'eval_los' is no figure"):
        Plateau(EarlyStopping(metric="eval_los"), []).see({"step": 1, "loss": 2.0, "eval_loss": 2.0})


def test_attention_dropout_is_the_run_s_or_else_the_model_s(stories, batches, tmp_path, capsys):
    """One seed drops the same again; null takes the rate of config.json, 0 overrules it."""
    data, dropping = write_rows(tmp_path / "rows.jsonl", *batches), tmp_path / "dropping"
    shutil.copytree(stories, dropping)
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))

    def rows(name, model, rate):
        run = run_config(
            tmp_path, model, data, name, train={"steps": 2, "batch_size": 4, "dtype": "float32"},
            regularize={"attention_dropout": rate},
        )  # fmt: skip
        return np.asarray(curve(run)).tolist()

    plain, dropped = rows("plain", stories, None), rows("dropped", stories, 0.2)
    assert "leaves out 0.2 of attention's weights (as configured)" in capsys.readouterr().out
    assert rows("own", dropping, None) == dropped == rows("again", stories, 0.2)
    assert "(attention_dropout of its config.json)" in capsys.readouterr().out
    assert rows("overruled", dropping, 0.0) == plain != dropped
    exported = json.loads((tmp_path / "own/export/model/config.json").read_text())
    assert exported["attention_dropout"] == 0.2


def test_everything_at_once_trains_averages_and_stops_early(stories, batches, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    run = run_config(
        tmp_path, stories, data, adapt={"rank": 2}, train={"steps": 12, "batch_size": 4, "dtype": "float32"},
        regularize={"attention_dropout": 0.1, "neftune": 5.0,
                    "label_smoothing": 0.1, "z_loss": 1e-4, "l2_start": 0.1, "kl_start": 0.5},
        average={"decay": 0.5}, early_stopping={"metric": "loss", "mode": "max", "patience": 4, "min_delta": 100.0},
    )  # fmt: skip
    typo = dataclasses.replace(run, output=str(tmp_path / "typo"), checkpoint=Checkpoint(best=Best("los")))
    with pytest.raises(llmtune.LlmtuneError, match=r"checkpoint.best.metric: 'los' is no figure"):
        llmtune.train(typo, devices=jax.devices()[:1])
    llmtune.train(run, devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5  # the first, and four that were not better
    terms = [row["cross_entropy"] for row in rows]
    assert rows[0]["kl_start"] >= 0 and rows[0]["l2_start"] == 0 < rows[-1]["l2_start"] and np.isfinite(terms).all()
    llmtune.train(run, devices=jax.devices()[:1])  # taken up again, it stays where it ended
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), "0.1", True])
def test_a_rate_that_is_none_is_refused_by_name(stories, tmp_path, rate):
    with pytest.raises(llmtune.LlmtuneError, match=r"regularize\.attention_dropout") as error:
        run_config(tmp_path, stories, tmp_path / "rows.jsonl", regularize={"attention_dropout": rate})
    assert "\n" not in str(error.value)
