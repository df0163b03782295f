"""Twenty steps on fixed batches against torch's AdamW on transformers (+ peft): losses to 1e-4, gradient norms to 1e-3."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import llmtune
from tests.parity.reference import load_reference, save_model
from tests.parity.torch_training import cosine, load_peer, loss_with_routing, train_peer
from tests.runs import FULL_BY_DAY, LORA_BY_DAY, STEPS, curve, run_config, write_rows


def fresh_adapter(model_directory, path, **settings):
    """peft's own initial adapter, with a small B in place of zeros, so that everything shows from the first step.

    (A large random B breaks the model: then torch in float32 and torch in float64 part by 4e-3 within twenty steps.)
    """
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_directory), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(path)
    return path


def test_full_fine_tuning_follows_torch(stories, batches, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    losses, norms = curve(run_config(tmp_path, stories, data))
    peer = train_peer(
        load_peer(stories), zip(*batches, strict=True),
        learning_rate=1e-3, schedule=cosine(STEPS, 3), weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(losses, [loss for loss, _ in peer], rtol=1e-4)
    np.testing.assert_allclose(norms, [norm for _, norm in peer], rtol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"r": 8, "lora_alpha": 16}, {"r": 4, "lora_alpha": 8, "use_rslora": True}], ids=["lora", "rslora"]
)
def test_lora_follows_peft_from_the_same_adapter(stories, batches, tmp_path, settings):
    adapter = fresh_adapter(stories, tmp_path / "adapter", **settings)
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    losses, norms = curve(run_config(tmp_path, stories, data, adapt={"from": str(adapter)}))
    model = load_peer(stories, adapter)
    peer = train_peer(
        model,
        zip(*batches, strict=True),
        learning_rate=1e-3,
        schedule=cosine(STEPS, 3),
        weight_decay=0.1,
        clip_norm=1.0,
    )
    np.testing.assert_allclose(losses, [loss for loss, _ in peer], rtol=1e-4)
    np.testing.assert_allclose(norms, [norm for _, norm in peer], rtol=1e-3)

    tokens = torch.tensor(batches[0][0])
    exported = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(stories), tmp_path / "run/export/adapter"
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/model").eval()
    with torch.no_grad():
        trained, theirs, whole = (m(tokens).logits.numpy() for m in (model.eval(), exported, merged))
    ours = llmtune.load(tmp_path / "run")
    assert ours.params["layers"][0]["attention"]["q"]["kernel"].rslora == settings.get("use_rslora", False)
    np.testing.assert_allclose(ours.logits(tokens.numpy()), theirs, atol=1e-4)
    np.testing.assert_allclose(whole, theirs, atol=1e-4)
    np.testing.assert_allclose(trained, theirs, atol=2e-3)  # twenty steps of two implementations apart


@pytest.mark.parametrize("adapt", LORA_BY_DAY)
def test_microbatches_of_unequal_token_counts_change_nothing(stories, batches, tmp_path, adapt):
    tokens, labels = batches
    labels = labels.copy()
    labels[:, 1] = -100  # a row, and with four microbatches a whole microbatch, of very few targets
    labels[:, 1, 40:43] = tokens[:, 1, 40:43]
    data = write_rows(tmp_path / "rows.jsonl", tokens, labels)
    curves = [
        curve(run_config(tmp_path, stories, data, name=f"run{pieces}", adapt=adapt,
                         train={"steps": 6, "batch_size": 4, "dtype": "float32", "microbatches": pieces}))
        for pieces in (1, 2, 4)
    ]  # fmt: skip
    for losses, norms in curves[1:]:
        np.testing.assert_allclose(losses, curves[0][0], rtol=1e-6)
        np.testing.assert_allclose(norms, curves[0][1], rtol=1e-5)


@pytest.mark.parametrize("adapt", FULL_BY_DAY)
def test_a_mixture_of_experts_follows_torch_with_its_routing_loss(tmp_path, adapt):
    """Full fine-tuning against torch; with an adapter, that only attention is adapted and that peft reads what was exported."""
    base = save_model("mixtral", tmp_path / "hf", num_hidden_layers=2, router_aux_loss_coef=0.1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(12, 199, (6, 4, 64)).astype(np.int32)
    labels = np.where(rng.random(tokens.shape) < 0.6, tokens, -100).astype(np.int32)
    data = write_rows(tmp_path / "rows.jsonl", tokens, labels)
    train = {"steps": 6, "batch_size": 4, "dtype": "float32"}
    losses, norms = curve(run_config(tmp_path, base, data, adapt=adapt, train=train))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.1 * row["aux_loss"], rel=1e-5)
    if adapt is None:
        peer = train_peer(
            load_peer(base), zip(tokens, labels, strict=True), learning_rate=1e-3, schedule=cosine(6, 3), weight_decay=0.1,
            clip_norm=1.0, loss_of=loss_with_routing,
        )  # fmt: skip
        np.testing.assert_allclose(losses, [loss for loss, _ in peer], rtol=1e-4)
        np.testing.assert_allclose(norms, [norm for _, norm in peer], rtol=1e-3)
        return
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run/export/adapter").eval()
    assert {name.split(".")[-4] for name, _ in peft.named_parameters() if "lora_A" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    with torch.no_grad():
        expected = peft(torch.tensor(tokens[0])).logits.numpy()
    np.testing.assert_allclose(llmtune.load(tmp_path / "run").logits(tokens[0]), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["biases", "mistral 3, text tower"])
def test_adapters_on_other_architectures_mean_the_same_in_peft(tmp_path, name):
    base = save_model(name, tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(12, 199, (2, 40))
    reference = load_reference(base)
    torch.manual_seed(0)
    peft = get_peft_model(
        reference, LoraConfig(r=4, lora_alpha=8, target_modules=r".*(language_model|model)\.layers.*_proj")
    ).eval()
    for parameter_name, parameter in peft.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft.save_pretrained(tmp_path / "adapter")
    model = llmtune.load(base, adapters=[tmp_path / "adapter"])
    with torch.no_grad():
        expected = peft(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-4)
    model.save_adapter(tmp_path / "again")
    again = PeftModel.from_pretrained(load_reference(base), tmp_path / "again").eval()
    assert not [name for name, _ in again.named_parameters() if "lora" in name and "vision" in name]
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)
