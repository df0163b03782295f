"""Adapter arithmetic against peft's `add_weighted_adapter`, and what holds of it without peft."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms import COMBINATIONS, Factors, change_rank, combine_adapters
from llmtune.transforms.arithmetic import dare

IN, OUT, RANKS, ALPHAS, WEIGHTS = 12, 10, (4, 4), (8, 2), (0.7, -0.4)
PATH = "layers/0/attention/q/kernel"
PEFT = {"cat": "cat", "svd": "svd", "linear": "linear", "ties": "ties", "ties_svd": "ties_svd"}


def product(factors):
    return factors.scale[..., None, None].astype(np.float64) * (factors.a.astype(np.float64) @ factors.b)


def peft_model(ranks):
    torch.manual_seed(0)
    model, adapters = nn.Sequential(nn.Linear(IN, OUT, bias=False)), []
    for number, (rank, alpha) in enumerate(zip(ranks, ALPHAS, strict=True)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(model, config, "a0") if number == 0 else model
        if number:
            model.add_adapter("a1", config)
    layer = model.base_model.model[0]
    for number, (rank, alpha) in enumerate(zip(ranks, ALPHAS, strict=True)):
        a, b = (getattr(layer, f"lora_{side}")[f"a{number}"].weight.detach().numpy().T[None] for side in "AB")
        adapters.append({PATH: Factors(a, b, np.array([alpha / rank], np.float32))})
    return model, layer, adapters


@pytest.mark.parametrize("how", list(PEFT))
def test_it_is_what_peft_makes(how):
    model, layer, adapters = peft_model(RANKS)
    more = {"density": 0.6} if "ties" in how else {}
    model.add_weighted_adapter(["a0", "a1"], list(WEIGHTS), "both", PEFT[how], **more)
    expected = layer.get_delta_weight("both").detach().numpy().T
    ours = combine_adapters(adapters, WEIGHTS, how, **more)[PATH]
    np.testing.assert_allclose(product(ours)[0], expected, atol=1e-5)


def test_dropping_and_rescaling_is_what_peft_does_with_the_same_mask(monkeypatch):
    model, layer, adapters = peft_model(RANKS)
    masks = np.random.default_rng(3)
    draw = lambda input: torch.tensor(masks.random(tuple(input.shape)[::-1]).T < 0.5, dtype=torch.float32)  # noqa: E731
    monkeypatch.setattr(torch, "bernoulli", lambda input: draw(input))
    model.add_weighted_adapter(["a0", "a1"], list(WEIGHTS), "both", "dare_linear", density=0.5)
    expected = layer.get_delta_weight("both").detach().numpy().T
    ours = combine_adapters(adapters, WEIGHTS, "dare", density=0.5, seed=3)[PATH]
    np.testing.assert_allclose(product(ours)[0], expected, atol=1e-5)


def test_dare_keeps_the_mean():
    ones = np.ones((300, 300))
    out = dare(0.3, np.random.default_rng(0))([ones], [1.0])
    assert set(np.unique(out).round(6)) == {0.0, round(1 / 0.3, 6)} and abs(out.mean() - 1) < 0.02


def test_the_sum_is_exact_where_ranks_and_layers_differ():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    one = Factors(draw(3, IN, 4), draw(3, 4, OUT), np.array([0.5, 2, 1], np.float32))
    other = Factors(draw(3, IN, 2), draw(3, 2, OUT), np.array([0, 1, 0], np.float32), ranks=(0, 2, 0))
    both = combine_adapters([{PATH: one, "only": one}, {PATH: other}], (1.0, -3.0), "cat")
    np.testing.assert_allclose(product(both[PATH]), product(one) - 3 * product(other), atol=1e-5)
    np.testing.assert_allclose(product(both["only"]), product(one), atol=1e-5)
    assert both[PATH].ranks == (4, 6, 4)


def test_a_rank_grows_by_zeros_and_shrinks_to_the_nearest():
    rng = np.random.default_rng(0)
    one = Factors(rng.standard_normal((2, IN, 4)).astype(np.float32), rng.standard_normal((2, 4, OUT)).astype(np.float32),
                  np.array([0.5, 3], np.float32))  # fmt: skip
    wide, narrow = change_rank(one, 8, 2.0), change_rank(one, 2, 2.0)
    assert wide.a.shape == (2, IN, 8) and wide.ranks is None and np.all(wide.scale == 2)
    np.testing.assert_allclose(product(wide), product(one), atol=1e-5)
    values = np.linalg.svd(product(one), compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.norm(product(narrow) - product(one), axis=(1, 2)), np.linalg.norm(values[:, 2:], axis=1), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("ranks", "weights", "how", "more", "said"),
    [
        ((4, 2), WEIGHTS, "linear", {}, "differ in rank"),
        (RANKS, (1.0,), "cat", {}, "1 weights for 2 adapters"),
        (RANKS, WEIGHTS, "ties", {"density": 0.0}, "density"),
    ],
)
def test_what_cannot_be_combined_is_refused(ranks, weights, how, more, said):
    with pytest.raises(LlmtuneConfigError, match=said):
        combine_adapters(peft_model(ranks)[2], weights, how, **more)


def test_dora_is_not_linear():
    one = peft_model(RANKS)[2][0][PATH]
    with pytest.raises(LlmtuneConfigError, match="not linear"):
        combine_adapters([{PATH: Factors(one.a, one.b, one.scale, magnitude=one.b[:, 0])}], (1.0,), "cat")


def test_the_command_names_the_same_ways():
    from llmtune.export_command import COMBINATIONS as named

    assert named == COMBINATIONS
