"""LoRA as a transform: what it selects, declares and refuses, on declarations and on arrays alike."""

import jax
import numpy as np
import pytest

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.transforms import Factors, chain, lora, lora_from, select, weights_by_path
from llmtune.weights import LoRA, materialize

CONFIG = ModelConfig("LlamaForCausalLM", 64, 32, 48, 3, 4, 2, 8)


def declared():
    return declare(CONFIG)[1]


def test_named_rules_and_regular_expressions():
    paths = select(declared(), "all-linear")
    assert len(paths) == 7 and all("layers/0/" in path for path in paths)
    assert select(declared(), "attention") == [f"layers/0/attention/{n}/kernel" for n in "koqv"]
    assert select(declared(), ["q_proj", "up_proj"]) == ["layers/0/attention/q/kernel", "layers/0/mlp/up/kernel"]
    assert select(declared(), r"mlp/(gate|up)") == ["layers/0/mlp/gate/kernel", "layers/0/mlp/up/kernel"]


@pytest.mark.parametrize("rule", ["query_proj", "(", "nothing"])
def test_a_rule_that_matches_nothing_is_refused(rule):
    with pytest.raises(LlmtuneConfigError, match=r"adapt\.targets"):
        select(declared(), rule)


def test_factors_are_declared_from_the_base():
    transform = lora(rank=4, alpha=8, targets="q_proj")
    wrapped = transform.apply(declared(), transform.init(declared()))
    weight = wrapped["layers"][0]["attention"]["q"]["kernel"]
    assert isinstance(weight, LoRA)
    assert (weight.a.shape, weight.a.axes) == ((3, 32, 4), ("layers", "embed", "rank"))
    assert (weight.b.shape, weight.b.axes) == ((3, 4, 32), ("layers", "rank", "heads"))
    assert (weight.scale.shape, weight.scale.axes) == ((3,), ("layers",))


def test_initial_values_are_those_of_peft():
    transform = lora(rank=4, alpha=8, rslora=True)
    mesh = make_mesh({}, jax.devices()[:1])
    drawn = materialize(transform.init(declared()), jax.random.key(0), mesh, REPLICATED)
    factors = drawn["layers/0/attention/q/kernel"]
    bound = 32**-0.5
    assert np.abs(factors["a"]).max() <= bound and abs(np.std(factors["a"]) - bound / 3**0.5) < 0.01
    assert not np.any(factors["b"]) and np.allclose(factors["scale"], 8 / 2)


def test_initial_values_do_not_depend_on_the_mesh():
    transform = lora(rank=8, alpha=8)
    specs = transform.init(declared())
    from llmtune.sharding import Strategy

    one = materialize(specs, jax.random.key(0), make_mesh({}, jax.devices()[:1]), REPLICATED)
    eight = materialize(specs, jax.random.key(0), make_mesh({"fsdp": 8}), Strategy("fsdp", {"embed": ("fsdp",)}))
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(LlmtuneConfigError, match="rank: 17 does not fit layers/0/attention/k/kernel"):
        lora(rank=17, alpha=8).init(declared())


def test_given_values_are_checked_against_the_base():
    path = "layers/0/attention/q/kernel"
    good = Factors(np.zeros((3, 32, 2), np.float32), np.zeros((3, 2, 32), np.float32), np.ones(3, np.float32))
    assert set(lora_from({path: good}, rslora=False).init(declared())) == {path}
    bad = Factors(np.zeros((3, 16, 2), np.float32), good.b, good.scale)
    with pytest.raises(LlmtuneFormatError, match="another base model"):
        lora_from({path: bad}, rslora=False).init(declared())
    with pytest.raises(LlmtuneFormatError, match="does not have"):
        lora_from({"layers/7/x/kernel": good}, rslora=False).init(declared())


def test_chain_nests_adapters():
    transform = chain(lora(rank=2, alpha=2, targets="q_proj"), lora(rank=3, alpha=2, targets="q_proj"))
    wrapped = transform.apply(declared(), transform.init(declared()))
    outer = weights_by_path(wrapped)["layers/0/attention/q/kernel"]
    assert outer.a.shape[-1] == 3 and outer.base.a.shape[-1] == 2
