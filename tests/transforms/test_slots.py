"""Slots: filling them, what they cost while empty, what excludes what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.models.attention import Attention
from llmtune.models.config import Experts, ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import REPLICATED, Strategy, make_mesh
from llmtune.training.remat import POLICIES
from llmtune.transforms import (
    adapters,
    chain,
    combine,
    fusion_of,
    lora,
    p_tuning,
    parallel_adapters,
    partition,
    prefix_from,
    prefix_tuning,
    prompt_from,
    prompt_tuning,
    sequential_adapters,
    sequential_from,
    slots,
)
from llmtune.weights import materialize, put

CONFIG = ModelConfig("LlamaForCausalLM", 64, 32, 48, 3, 4, 2, 8)
MIXTURE = ModelConfig("MixtralForCausalLM", 64, 32, 48, 3, 4, 2, 8, experts=Experts(4, 2, 0.02))
ROWS = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), ROWS.shape)
SEGMENTS = np.where(np.arange(12) < 9 + np.arange(8)[:, None] % 4, 1, 0).astype(np.int32)


def branch(seed, size=5, layers=3, hidden=32):
    rng = np.random.default_rng(seed)
    shapes = {"down": (hidden, size), "down_bias": (size,), "up": (size, hidden), "up_bias": (hidden,)}
    return {name: rng.standard_normal((layers, *shape)).astype(np.float32) for name, shape in shapes.items()}


DOWN, EXPERTS_DOWN = "layers/0/mlp/down/kernel", "layers/0/mlp/experts/down/kernel"
FUSED = fusion_of([{DOWN: branch(0)}, {DOWN: branch(1, size=3)}])
METHODS = {
    "prompt tuning": prompt_tuning(virtual_tokens=4),
    "p-tuning": p_tuning(virtual_tokens=4, encoder_hidden=8),
    "p-tuning, recurrent": p_tuning(virtual_tokens=4, encoder="lstm", encoder_hidden=8),
    "prefix tuning": prefix_tuning(virtual_tokens=4),
    "houlsby": sequential_adapters("houlsby", size=4),
    "pfeiffer": sequential_adapters("pfeiffer", size=4),
    "parallel": parallel_adapters(size=4),
    "fusion": FUSED,
    "prefix and lora": chain(prefix_tuning(virtual_tokens=4), lora(rank=2, alpha=4)),
}
IDENTITIES = ("houlsby", "pfeiffer", "parallel")  # those that promise to change nothing at first


def adapted(config, transform, mesh, strategy, seed=0):
    graphdef, declared = declare(config)
    with jax.set_mesh(mesh), strategy.active():
        params = materialize(declared, jax.random.key(7), mesh, strategy)
        additions = materialize(transform.init(declared), jax.random.key(seed), mesh, strategy)
        return graphdef, params, transform.apply(params, additions)


def train_step(graphdef, params, mesh, strategy, steps=1, remat="none"):
    """(log-probabilities before, trainable before, trainable after, frozen) of plain gradient steps under jit."""
    trainable, frozen = partition(params, adapters)

    def loss(trainable, tokens, positions, segments):
        model = LanguageModel(graphdef, combine(trainable, frozen), remat=POLICIES[remat], packed=False)
        log_probs, _, _ = model.token_log_probs(tokens, positions, segments, tokens)
        return -(log_probs * (segments > 0)).sum(), log_probs

    @jax.jit
    def step(trainable, *batch):
        with strategy.active():
            (_, log_probs), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, *batch)
            return jax.tree.map(lambda w, g: w - 1e-2 * g, trainable, gradient), log_probs

    layout = NamedSharding(mesh, strategy.spec("batch", "seq"))
    with jax.set_mesh(mesh):
        batch = [jax.device_put(rows, layout) for rows in (ROWS, POSITIONS, SEGMENTS)]
        after, log_probs = step(trainable, *batch)
        for _ in range(steps - 1):
            after, _ = step(after, *batch)
    return np.asarray(log_probs), trainable, after


def test_empty_slots_cost_nothing(monkeypatch):
    """No virtual token is looked for and no learned value put anywhere: the trace never comes by."""
    graphdef, declared = declare(CONFIG)
    assert {path for path, leaf in slots(declared).items() if leaf is None} >= {
        "prompt", "layers/0/attention/prefix", "layers/0/mlp/adapter"
    }  # fmt: skip

    def refuse(*arguments):
        raise AssertionError("an empty slot was computed with")

    monkeypatch.setattr(Attention, "prefixed", refuse)
    monkeypatch.setattr("llmtune.models.decoder.places", refuse)
    monkeypatch.setattr("llmtune.models.language_model._with_room", refuse)
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), declared)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        jax.make_jaxpr(lambda params: LanguageModel(graphdef, params).logits(ROWS, POSITIONS, SEGMENTS))(shapes)


@functools.cache
def on_one_device(method):
    """(graphdef, base, log-probabilities before, trainable before and after two steps) under scan and jit."""
    mesh = make_mesh({}, jax.devices()[:1])
    graphdef, base, params = adapted(CONFIG, METHODS[method], mesh, REPLICATED)
    return graphdef, base, *train_step(graphdef, params, mesh, REPLICATED, steps=2)


BY_NIGHT = ("prompt tuning", "p-tuning", "p-tuning, recurrent", "pfeiffer", "parallel", "prefix and lora")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.nightly) if name in BY_NIGHT else name for name in METHODS]
)
def test_a_step_moves_the_adapter_alone(method):
    graphdef, base, log_probs, before, after = on_one_device(method)
    moved = jax.tree.map(lambda b, a: bool(np.any(np.asarray(b) != np.asarray(a))), before, after)
    assert all(jax.tree.leaves(moved))
    plain = [leaf for path, leaf in slots(before).items() if path.split("/")[-1] in ("weight", "table", "bias")]
    assert plain and not any(leaf is not None for leaf in plain)  # the base's own arrays are not among what trains
    if method in IDENTITIES:
        with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
            model = LanguageModel(graphdef, base, packed=False)
            expected = jax.jit(lambda *rows: model.token_log_probs(*rows, rows[0])[0])(ROWS, POSITIONS, SEGMENTS)
        np.testing.assert_allclose(log_probs, expected, atol=1e-6)  # compiled apart


BY_DAY = ("prefix tuning",)


@pytest.mark.parametrize(
    "method", [name if name in BY_DAY else pytest.param(name, marks=pytest.mark.nightly) for name in METHODS]
)
def test_eight_devices_with_explicit_axes_and_remat(method):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    tensor = {name: ("tensor",) for axis in ("mlp", "heads", "kv_heads") for name in (axis, f"act_{axis}")}
    strategy = Strategy("both", {"batch": ("fsdp",), "embed": ("fsdp",), **tensor}, ("fsdp",))
    _, _, log_probs, _, after = on_one_device(method)
    graphdef, _, params = adapted(CONFIG, METHODS[method], mesh, strategy)
    spread, _, spread_after = train_step(graphdef, params, mesh, strategy, steps=2, remat="block")
    np.testing.assert_allclose(spread, log_probs, atol=2e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), spread_after, after)


@pytest.mark.parametrize("method", [pytest.param("prefix tuning", marks=pytest.mark.nightly), "parallel"])
def test_mixtures_of_experts(method):
    mesh = make_mesh({}, jax.devices()[:1])
    graphdef, _, params = adapted(MIXTURE, METHODS[method], mesh, REPLICATED)
    _, before, after = train_step(graphdef, params, mesh, REPLICATED, steps=2)
    assert all(jax.tree.leaves(jax.tree.map(lambda b, a: bool(np.any(b != a)), before, after)))
    after = sequential_adapters("pfeiffer", size=4).init(declare(MIXTURE)[1])
    assert {path: own["down"].shape for path, own in after.items()} == {
        "layers/0/mlp/experts/down/kernel": (3, 4, 32, 4)
    }
    with pytest.raises(LlmtuneConfigError, match="which is of experts"):
        fusion_of([{EXPERTS_DOWN: branch(0)}, {EXPERTS_DOWN: branch(1)}]).init(declare(MIXTURE)[1])


def test_fusion_begins_as_the_mean_of_its_adapters():
    """With queries of zero, exactly; against numpy."""
    weight = adapted(CONFIG, FUSED, make_mesh({}, jax.devices()[:1]), REPLICATED)[2]["layers"][0]["mlp"]["down"][
        "kernel"
    ]
    layer = jax.tree.map(lambda leaf: leaf[1], weight)
    layer = type(layer)(layer.base, layer.branches, jnp.zeros_like(layer.query), layer.key, layer.value)
    x = np.random.default_rng(3).standard_normal((2, 5, 48)).astype(np.float32)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        out = layer.apply(jnp.asarray(x), ("batch", "seq", "act_embed"))
    y = x @ np.asarray(layer.base, np.float64)
    changes = []
    for values in (branch(0), branch(1, size=3)):
        down, down_bias, up, up_bias = (own[1].astype(np.float64) for own in values.values())
        changes.append(np.maximum(y @ down + down_bias, 0) @ up + up_bias)
    np.testing.assert_allclose(out, y + np.mean(changes, axis=0), atol=1e-4)


def test_fusion_attends_as_the_paper_says():
    weight = adapted(CONFIG, FUSED, make_mesh({}, jax.devices()[:1]), REPLICATED)[2]["layers"][0]["mlp"]["down"][
        "kernel"
    ]
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), weight)
    rng = np.random.default_rng(4)
    query, key, value = (0.1 * rng.standard_normal((32, 32)) for _ in range(3))
    fused = type(weight)(layer.base, layer.branches, query, key, value)
    x = rng.standard_normal((2, 5, 48))
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), fused)
        out = single.apply(jnp.asarray(x, jnp.float32), ("batch", "seq", "act_embed"))
    y = x @ layer.base
    z = np.stack([np.maximum(y @ layer.branches.down[n] + layer.branches.down_bias[n], 0) @ layer.branches.up[n]
                  + layer.branches.up_bias[n] for n in range(2)])  # fmt: skip
    scores = np.einsum("bsd,nbsd->nbs", y @ query, z @ key)
    shares = np.exp(scores - scores.max(0)) / np.exp(scores - scores.max(0)).sum(0)
    np.testing.assert_allclose(out, y + (shares[..., None] * (z @ value)).sum(0), atol=1e-4)


def test_what_excludes_what():
    _, declared = declare(CONFIG)
    for one, other in (
        ("prompt tuning", "prefix tuning"),
        ("prefix tuning", "prompt tuning"),
        ("p-tuning", "prompt tuning"),
    ):
        with pytest.raises(LlmtuneConfigError, match="the model has virtual tokens already"):
            chain(METHODS[one], METHODS[other]).init(declared)
    with pytest.raises(LlmtuneConfigError, match="the slot layers/0/mlp/adapter is filled already"):
        chain(METHODS["parallel"], METHODS["parallel"]).init(declared)
    with pytest.raises(LlmtuneConfigError, match="virtual_tokens: prompt_tuning needs 1 or more, got 0"):
        prompt_tuning(virtual_tokens=0).init(declared)
    with pytest.raises(LlmtuneConfigError, match="a bottleneck needs a width of 1 or more"):
        sequential_adapters("houlsby", size=0).init(declared)


def test_values_of_another_base_are_refused():
    _, declared = declare(CONFIG)
    wide = branch(0, hidden=40)
    for transform in (
        prompt_from(np.zeros((3, 40), np.float32)),
        prefix_from({name: np.zeros((2, 3, 16), np.float32) for name in "kv"}),
        sequential_from({DOWN: wide}),
        fusion_of([{DOWN: branch(0)}, {DOWN: wide}]),
    ):
        with pytest.raises(LlmtuneFormatError, match="made for another base model"):
            transform.init(declared)
    with pytest.raises(LlmtuneConfigError, match="fusion is of two adapters or more, 1 given"):
        fusion_of([{DOWN: branch(0)}])
    with pytest.raises(LlmtuneConfigError, match="stand in different places"):
        fusion_of([{DOWN: branch(0)}, {DOWN: branch(1), "layers/0/attention/o/kernel": branch(2)}])
    with pytest.raises(LlmtuneFormatError, match="which this model does not have"):
        sequential_from({"layers/0/mlp/experts/down/kernel": branch(0)}).init(declared)


def test_learned_values_stand_in_their_places_alone():
    virtual = jnp.asarray([[[True, False], [False, True], [False, False]]])
    out = put(jnp.ones((1, 3, 4)), jnp.full((1, 3, 4), 5.0), virtual)
    np.testing.assert_array_equal(out[0, :, 0], [5, 5, 1])
