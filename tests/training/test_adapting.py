"""From sections to one transform: what they choose, and what is refused before anything is read."""

import pytest

from llmtune import pretrained
from llmtune.config.adapt import METHODS
from llmtune.config.file import build_run
from llmtune.errors import LlmtuneConfigError
from llmtune.models.decoder import declare
from llmtune.training.adapting import METHODS as TRANSFORMS
from llmtune.training.adapting import choose_transform, learning_rates
from llmtune.training.freezing import stacks
from llmtune.training.vocabulary import settle_vocabulary
from llmtune.transforms import weights_by_path
from llmtune.weights import Adapter, path_name


def run_of(starter, adapt):
    tree = {"model": str(starter), "output": "out", "data": {"train": "rows.jsonl"}, "adapt": adapt}
    return build_run(tree, "run.yaml")


def choose(starter, adapt):
    """(what is declared, what trains) of a run on the starter model."""
    run = run_of(starter, adapt)
    source, _ = settle_vocabulary(run, pretrained.open_source(run.model))
    declared = declare(source.config)[1]
    sections = run.adapt if isinstance(run.adapt, list) else [run.adapt]
    transform = choose_transform(sections, source, declared, grown=False).transform
    weights = weights_by_path(transform.apply(declared, transform.init(declared)))
    return weights, {path for path, weight in weights.items() if transform.trains(path, weight)}


def test_every_method_has_its_row():
    assert set(METHODS.values()) == set(TRANSFORMS)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_a_method_by_name_adapts_and_only_that_trains(starter, method):
    weights, trains = choose(starter, {"method": method})
    assert trains == {path for path, weight in weights.items() if isinstance(weight, Adapter)} != set()


def test_ia3_stretches_the_input_of_down_where_it_is_a_target(starter):
    weights, trains = choose(starter, {"method": "ia3"})
    assert {path.split("/")[-2]: weights[path].side for path in trains} == {"k": "out", "v": "out", "down": "in"}
    weights, trains = choose(starter, {"method": "ia3", "targets": ["q_proj"]})
    assert {path: weights[path].side for path in trains} == {"layers/0/attention/q/kernel": "out"}


def test_sections_of_a_list_adapt_different_weights(starter):
    weights, trains = choose(starter, [
        {"rank": 4, "targets": "attention"},
        {"rank": 2, "targets": "mlp", "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 6.0}},
    ])  # fmt: skip
    ranks = {path.split("/")[-2]: weights[path].a.shape[-1] for path in trains}
    assert ranks == {**dict.fromkeys("qkvo", 4), "gate": 2, "up": 2, "down": 3}


def test_full_trains_what_it_names_and_freezes_what_it_names(starter):
    _, trains = choose(starter, {"method": "full", "train": ["norm", "down_proj"], "freeze": ["input_layernorm"]})
    assert trains == {"norm/weight", "layers/0/mlp_norm/weight", "layers/0/mlp/down/kernel"}
    weights, trains = choose(starter, {"method": "full", "freeze": ["embed_tokens"]})
    assert trains == set(weights) - {"embed/table"}


def test_a_tied_head_is_untied_where_that_is_asked_for(starter):
    source = pretrained.open_source(str(starter))
    assert source.config.tie_word_embeddings
    weights, trains = choose(starter, {"targets": ["embed_tokens"], "rank": 4, "untie": True})
    assert trains == {"embed/table"} and "head/kernel" in weights


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_both_ends_of_a_tied_model_share_an_adapter_where_that_is_asked_for(starter, targets):
    weights, trains = choose(starter, {"targets": targets, "rank": 4, "ensure_weight_tying": True})
    assert trains == {"embed/table"} and "head/kernel" not in weights


def test_b_has_a_learning_rate_of_its_own(starter):
    rate = learning_rates([run_of(starter, {"b_rate": 16.0}).adapt])
    assert rate("layers/0/attention/q/kernel/b") == 16 and rate("layers/0/attention/q/kernel/a") == 1
    assert learning_rates([])("head/kernel/b") == 1


@pytest.mark.parametrize(
    ("chosen", "cut"),
    [(0, [(2, False)]), (1, [(1, True), (1, False)]), ([1], [(1, False), (1, True)]), ([0, 1], [(2, True)])],
)
def test_layers_that_stay_are_stacks_of_their_own(starter, chosen, cut):
    section = run_of(starter, {"method": "full", "freeze_layers": chosen}).adapt
    assert [(stack.layers, stack.frozen) for stack in stacks([section], 2)] == cut


REFUSED = {
    "a rule of nothing": ({"targets": ["qq_proj"]}, "adapt.targets: 'qq_proj' matches no weight; nearest: q_proj"),
    "a pattern of nothing": ({"rank_pattern": {"qq_proj": 2}}, "adapt.rank_pattern.qq_proj: 'qq_proj' matches no weight"),
    "a rank beyond the matrix": ({"rank": 4096}, "adapt.rank: 4096 does not fit layers/0/"),
    "a rank of a pattern beyond the matrix": ({"rank_pattern": {"q_proj": 999}}, "adapt.rank_pattern.q_proj: 999 does not fit"),
    "a rank beyond the matrix, in a list": (
        [{"targets": "attention"}, {"targets": "mlp", "rank": 999}], "adapt.1.rank: 999 does not fit layers/0/mlp/"),
    "a pattern of nothing, in a list": (
        [{"targets": "mlp", "alpha_pattern": {"x_proj": 1.0}}, {"targets": "attention"}],
        "adapt.0.alpha_pattern.x_proj: 'x_proj' matches no weight"),
    "a stretched input that is no target": (
        {"method": "ia3", "targets": ["q_proj"], "feedforward": ["down_proj"]},
        "adapt.feedforward: layers/0/mlp/down/kernel is not among adapt.targets"),
    "a layer that is not there": ({"layers": [0, 99]}, "adapt.layers: there is no layer 99 in"),
    "the table of a tied model": ({"targets": ["embed_tokens"]}, "set untie: true, or"),
    "the table of a tied model by its path": ({"targets": ["embed/table"]}, "or ensure_weight_tying: true"),
    "ends that are parted and tied": ({"untie": True, "ensure_weight_tying": True}, "adapt.ensure_weight_tying: untie parts"),
    "the table in IA3": ({"method": "ia3", "targets": ["embed/table"]}, "adapt.targets: embed/table: this model's head is tied"),
    "the head of a tied model": ({"targets": ["lm_head"]}, "set untie: true, or"),
    "the table in DoRA": ({"method": "dora", "targets": ["embed_tokens"], "untie": True}, "DoRA adapts no embedding"),
    "the table in VeRA": ({"method": "vera", "targets": ["q_proj", "embed/table"]}, "embed/table: this model's head is tied"),
    "a stretched input of nothing": ({"method": "ia3", "feedforward": ["upp"]}, "adapt.feedforward: 'upp' matches no weight"),
    "one weight twice": ([{"targets": "attention"}, {"targets": "q_proj"}], "adapt.1: layers/0/attention/q/kernel has an"),
    "nothing left": ({"method": "full", "train": ["norm"], "freeze": ["norm"]}, "adapt.freeze: nothing is left to train"),
    "a frozen layer that is not there": (
        {"method": "full", "freeze_layers": [40]}, "adapt.freeze_layers: there is no layer 40; the model has"),
    "more frozen layers than there are": ({"method": "full", "freeze_layers": 40}, "adapt.freeze_layers: there is no layer"),
    "a layer below the first": ({"method": "full", "freeze_layers": -1}, "adapt.freeze_layers: -1 must be 0 or more"),
    "full, of nothing": ({"method": "full", "train": ["pooler"]}, "adapt.train: 'pooler' names no weight"),
    "rates that differ": ([{"targets": "attention"}, {"targets": "mlp", "b_rate": 2.0}], "adapt.b_rate: sections differ"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_is_refused_in_one_line(starter, case):
    adapt, said = REFUSED[case]
    with pytest.raises(LlmtuneConfigError) as caught:
        choose(starter, adapt)
        learning_rates(run_of(starter, adapt).adapt)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_path_names_are_those_that_rates_go_by():
    import jax

    from llmtune.weights import LoRA

    leaves = jax.tree_util.tree_leaves_with_path({"q": LoRA(1, 2, 3, 4)})
    assert [path_name(path) for path, _ in leaves] == ["q/base", "q/a", "q/b", "q/scale"]
