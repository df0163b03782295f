"""Weights that train in whole: which a name means, float32 masters, and that nothing else comes to train."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.transforms import (
    chain,
    combine,
    given_whole,
    lora,
    partition,
    select_whole,
    train_whole,
    weights_by_path,
)
from llmtune.weights import LoRA

CONFIG = ModelConfig("LlamaForCausalLM", 64, 32, 48, 3, 4, 2, 8)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
NORMS = ("layers/0/attention_norm/weight", "layers/0/mlp_norm/weight", "norm/weight")


def declared(config=CONFIG):
    return declare(config)[1]


@pytest.mark.parametrize(
    ("rules", "paths"),
    [
        (["embed_tokens", "lm_head"], ("embed/table", "head/kernel")),
        (["norm"], NORMS),  # peft matches the end of a module's name
        (["model.norm"], NORMS[2:]),
        (["input_layernorm", "post_attention_layernorm"], NORMS[:2]),
        (["down_proj"], ("layers/0/mlp/down/kernel",)),
        ([r"attention/(q|k)/"], ("layers/0/attention/k/kernel", "layers/0/attention/q/kernel")),
        ([], ()),
    ],
)
def test_names(rules, paths):
    assert select_whole(declared(), rules) == paths


def test_either_end_of_a_tied_model_is_its_table():
    assert (
        select_whole(declared(TIED), ["lm_head"]) == select_whole(declared(TIED), ["embed_tokens"]) == ("embed/table",)
    )


@pytest.mark.parametrize("rule", ["pooler", "(", ""])
def test_a_name_of_nothing_is_refused(rule):
    with pytest.raises(LlmtuneConfigError, match=r"adapt\.modules_to_save"):
        select_whole(declared(), [rule])


def test_masters_are_float32_and_only_they_and_the_factors_train():
    transform = chain(lora(rank=2, alpha=2, targets="q_proj"), train_whole(["embed/table", "norm/weight"]))
    base = jax.tree.map(lambda spec: jnp.zeros(spec.shape, "bfloat16"), declared())
    factors, nothing = transform.init(declared())
    drawn = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), factors)
    adapted = transform.apply(base, (drawn, nothing))
    trainable, frozen = partition(adapted, transform.trains)
    weights = weights_by_path(trainable)
    trains = {path: weight.dtype for path, weight in weights.items() if not isinstance(weight, LoRA)}
    assert trains == {"embed/table": np.float32, "norm/weight": np.float32}
    assert len(jax.tree.leaves(trainable)) == 4  # and the two factors
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {np.dtype("float32"), jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, combine(trainable, frozen), adapted)


def test_a_weight_trains_in_one_way():
    transform = chain(lora(rank=2, alpha=2, targets="q_proj"), train_whole(["layers/0/attention/q/kernel"]))
    with pytest.raises(LlmtuneConfigError, match=r"adapt.modules_to_save: layers/0/attention/q/kernel is among"):
        transform.init(declared())


def test_given_values_take_the_place_of_the_bases_and_are_checked_against_them():
    value = np.ones(32, np.float32)
    transform = given_whole({"norm/weight": value})
    params = {"norm": {"weight": jnp.zeros(32)}, "embed": {"table": jnp.zeros((64, 32))}}
    assert transform.apply(params, {"norm/weight": value})["norm"]["weight"] is value
    for path, wrong in (("norm/weight", value[:-1]), ("pooler/weight", value)):
        with pytest.raises(LlmtuneFormatError, match="another base model"):
            given_whole({path: wrong}).init(declared())
