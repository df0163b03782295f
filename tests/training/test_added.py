"""Runs of methods that add to the computation: trained, measured, exported as an adapter alone, read back, fused."""

import json

import jax
import numpy as np
import pytest

import llmtune
from llmtune.errors import LlmtuneError
from llmtune.transforms import weights_by_path
from tests.runs import curve, run_config, write_rows

TRAIN = {"steps": 3, "batch_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def rows(batches, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *(part[:4] for part in batches))


def data(rows):
    return {"train": str(rows), "validation": str(rows), "format": "tokens", "sequence_length": 64, "packing": False}


def evaluation(run):
    return json.loads((run / "evaluation.json").read_text())


@pytest.mark.parametrize("adapt", [
    {"method": "p_tuning", "virtual_tokens": 5, "encoder": "lstm", "encoder_hidden": 16},
    pytest.param({"method": "parallel_adapter", "size": 4}, marks=pytest.mark.nightly),
    pytest.param({"method": "prefix_tuning", "virtual_tokens": 5}, marks=pytest.mark.nightly),
], ids=lambda adapt: adapt["method"])  # fmt: skip
def test_a_run_is_read_back_as_it_was_measured(stories, rows, batches, tmp_path, adapt):
    wide = {**data(rows), "sequence_length": 150}  # there is room for two documents: they do not share a row
    curve(run_config(tmp_path, stories, rows, adapt=adapt, data=wide, train=TRAIN), devices=8)
    export = tmp_path / "run" / "export"
    assert not (export / "model").exists() and (export / "adapter" / "tokenizer.json").is_file()
    assert evaluation(tmp_path / "run")["after"]["loss"] < evaluation(tmp_path / "run")["before"]["loss"]
    model, tokens = llmtune.load(tmp_path / "run"), batches[0][0]
    assert model.config.eos_token_ids == llmtune.load(stories).config.eos_token_ids and model.tokenizer is not None
    every, labels = (part[:4].reshape(-1, 64) for part in batches)
    log_probs = jax.nn.log_softmax(model.logits(every)[:, :-1])
    chosen = np.take_along_axis(np.asarray(log_probs), every[:, 1:, None], axis=-1)[..., 0]
    loss = -chosen[labels[:, 1:] >= 0].mean()
    np.testing.assert_allclose(evaluation(tmp_path / "run")["after"]["loss"], loss, rtol=1e-5)
    model.save_adapter(tmp_path / "again")
    again = llmtune.load(stories, adapters=[tmp_path / "again"])
    np.testing.assert_allclose(again.logits(tokens), model.logits(tokens), atol=1e-6)
    if "virtual_tokens" in adapt:
        with pytest.raises(LlmtuneError, match="a row holds one document"):
            model.logits(tokens, segment_ids=1 + (np.arange(64) > 9) * np.ones_like(tokens))
    with pytest.raises(LlmtuneError, match="which no matrix can stand for; save_adapter"):
        model.save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("adapt", [
    {"method": "prompt_tuning", "virtual_tokens": 3},
    pytest.param({"method": "houlsby", "size": 4}, marks=pytest.mark.nightly),
], ids=lambda adapt: adapt["method"])  # fmt: skip
def test_over_a_quantised_base_a_run_ends_without_a_merged_model(stories, rows, batches, tmp_path, adapt):
    run = run_config(
        tmp_path, stories, rows, adapt=adapt, quantize={"base": "int8"}, data=data(rows), train={**TRAIN, "steps": 1}
    )
    llmtune.train(run, devices=jax.devices()[:1])
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == ["adapter"]
    assert "after" in evaluation(tmp_path / "run")
    assert np.isfinite(llmtune.load(tmp_path / "run").logits(batches[0][0])).all()


def test_two_adapters_are_fused_and_stay_as_they_are(stories, rows, tmp_path):
    paths = []
    for name, size in (("one", 4), ("other", 3)):
        run = run_config(tmp_path, stories, rows, name=name, adapt={"method": "houlsby", "size": size}, train=TRAIN)
        llmtune.train(run, devices=jax.devices()[:1])
        paths.append(tmp_path / name / "export" / "adapter")
    fusion = {"method": "fusion", "adapters": [str(path) for path in paths]}
    run = run_config(tmp_path, stories, rows, name="fused", adapt=fusion, data=data(rows), train=TRAIN)
    curve(run)
    assert evaluation(tmp_path / "fused")["after"]["loss"] < evaluation(tmp_path / "fused")["before"]["loss"]
    path = "layers/0/mlp/down/kernel"
    fused = weights_by_path(llmtune.load(tmp_path / "fused").params)[path]
    for number, own in enumerate(paths):
        branch = weights_by_path(llmtune.load(stories, adapters=[own]).params)[path].branch
        size = branch.down.shape[-1]
        np.testing.assert_array_equal(fused.branches.down[:, number, :, :size], branch.down)
        np.testing.assert_array_equal(fused.branches.up[:, number, :size], branch.up)
    assert np.abs(fused.value - np.eye(64)).max() > 0


REFUSED = {
    "packing": ({"method": "prefix_tuning"}, {"packing": True}, "data.packing: virtual tokens (adapt.virtual_tokens)"),
    "a long prompt": (
        {"method": "prompt_tuning", "virtual_tokens": 64}, {}, "adapt.virtual_tokens: 64 virtual tokens are longer than"
    ),
    "no tokens": ({"method": "p_tuning", "virtual_tokens": 0}, {}, "adapt.virtual_tokens: 0 must be positive"),
    "one adapter": ({"method": "fusion", "adapters": ["x"]}, {}, "adapt.adapters: 1 given; fusion is of two or more"),
    "no width": ({"method": "pfeiffer", "size": 0}, {}, "adapt.size: 0 must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_configuration_that_cannot_be_is_refused(stories, rows, tmp_path, case):
    adapt, more, said = REFUSED[case]
    with pytest.raises(LlmtuneError) as error:
        run_config(tmp_path, stories, rows, adapt=adapt, data={**data(rows), **more})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_only_the_model_can_say_is_refused_before_training(stories, rows, tmp_path):
    both = [{"method": "prompt_tuning", "virtual_tokens": 2}, {"method": "prefix_tuning", "virtual_tokens": 2}]
    with pytest.raises(LlmtuneError, match="prefix_tuning and prompt_tuning fit no one PEFT directory"):
        run_config(tmp_path, stories, rows, adapt=both, train=TRAIN)
    run = run_config(tmp_path, stories, rows, adapt={"method": "prefix_tuning", "virtual_tokens": 2}, train=TRAIN)
    llmtune.train(run, devices=jax.devices()[:1])
    adapter = tmp_path / "run" / "export" / "adapter"
    with_lora = [{"rank": 2}, {"from": str(adapter)}]
    with pytest.raises(LlmtuneError, match="Prefix in layers/0/attention/prefix cannot be merged, and no adapter"):
        llmtune.train(run_config(tmp_path, stories, rows, name="both", adapt=with_lora, train=TRAIN))
    packed = {**data(rows), "packing": True}
    with pytest.raises(LlmtuneError, match=r"set data\.packing: false"):
        llmtune.train(run_config(tmp_path, stories, rows, name="two", adapt={"from": str(adapter)}, data=packed))
    fusion = {"method": "fusion", "adapters": [str(adapter)] * 2}
    with pytest.raises(LlmtuneError, match="its method is PREFIX_TUNING; fusion is of adapters that method houlsby"):
        llmtune.train(run_config(tmp_path, stories, rows, name="three", adapt=fusion))
