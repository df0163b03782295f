"""What remat policies compute twice, counted by hand."""

import jax
import pytest

from llmtune.inspection import attention_flops
from llmtune.planning.costs import SCORES_AGAIN, step_costs
from llmtune.pretrained import open_source
from llmtune.training.weights import declare_base
from tests.planning.test_plan import small_run

ROWS, LENGTH = 4, 1024


def again(starter, remat):
    """(FLOPs per token that are computed twice, model) of a model in full."""
    source = open_source(str(starter))
    _, declared = declare_base(small_run(starter), source.config)
    nothing = jax.tree.map(lambda weight: None, declared)
    costs = step_costs(source.config, declared, nothing, rows=ROWS, length=LENGTH, remat=remat, itemsize=2)
    return (costs.computed_flops - costs.model_flops) / (ROWS * LENGTH), source.config


@pytest.mark.parametrize(
    ("remat", "products", "attention"),
    [("none", 0, 0), ("dots", 0, 1), ("attention", 1, 0), ("block", 1, 1), ("offload", 1, 1)],
)
def test_a_policy_pays_for_what_it_forms_again(starter, remat, products, attention):
    """`block` and `offload` all of a block but its last product, `attention` the products alone, `dots` attention alone."""
    found, config = again(starter, remat)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    block = 2 * (hidden * heads + 2 * hidden * kv + heads * hidden + 2 * hidden * inner) * config.num_hidden_layers
    head, pairs = 2 * hidden * config.vocab_size, attention_flops(config, LENGTH)
    assert found == pytest.approx(head + products * block + (SCORES_AGAIN + attention) * pairs, rel=1e-9)
