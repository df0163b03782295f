"""The declared tree: what its docstring shows, nothing allocated, slots that cost nothing until they are filled."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.weights import ArraySpec, path_name

CONFIG = ModelConfig("LlamaForCausalLM", 64, 32, 48, 3, 4, 2, 10)


def leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_one_declaration_gives_shape_and_axes():
    declared = leaves(declare(CONFIG)[1])
    assert all(isinstance(leaf, ArraySpec) for leaf in declared.values())
    shapes = {path: (spec.shape, spec.axes) for path, spec in declared.items()}
    assert shapes == {
        "embed/table": ((64, 32), ("vocab", "embed")),
        "head/kernel": ((32, 64), ("embed", "vocab")),
        "norm/weight": ((32,), (None,)),
        "layers/0/attention_norm/weight": ((3, 32), ("layers", None)),
        "layers/0/mlp_norm/weight": ((3, 32), ("layers", None)),
        "layers/0/attention/q/kernel": ((3, 32, 40), ("layers", "embed", "heads")),
        "layers/0/attention/k/kernel": ((3, 32, 20), ("layers", "embed", "kv_heads")),
        "layers/0/attention/v/kernel": ((3, 32, 20), ("layers", "embed", "kv_heads")),
        "layers/0/attention/o/kernel": ((3, 40, 32), ("layers", "heads", "embed")),
        "layers/0/mlp/gate/kernel": ((3, 32, 48), ("layers", "embed", "mlp")),
        "layers/0/mlp/up/kernel": ((3, 32, 48), ("layers", "embed", "mlp")),
        "layers/0/mlp/down/kernel": ((3, 48, 32), ("layers", "mlp", "embed")),
    }


def test_a_tied_head_declares_nothing():
    tied = declare(ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": True}))[1]
    assert tied["head"]["kernel"] is None and "head/kernel" not in leaves(tied)


def test_the_largest_models_are_declared_without_memory():
    declared = leaves(declare(ModelConfig("LlamaForCausalLM", 128_256, 16_384, 53_248, 126, 128, 8, 128))[1])
    assert sum(int(jnp.prod(jnp.array(s.shape, float))) for s in declared.values()) > 400e9


def test_a_slot_is_filled_without_a_new_graphdef():
    graphdef, declared = declare(CONFIG)
    slots = {path for path in ("prompt",) if declared[path] is None}
    slots |= {f"head/{name}" for name in ("score", "value") if declared["head"][name] is None}
    block = declared["layers"][0]
    slots |= {name for name, owner in (("prefix", "attention"), ("adapter", "mlp")) if block[owner][name] is None}
    assert slots == {"prompt", "head/score", "head/value", "prefix", "adapter"}
    filled = {**declared, "head": {**declared["head"], "score": jnp.ones((32, 1))}}
    assert nnx.merge(graphdef, filled).head.score.get_value().shape == (32, 1)
