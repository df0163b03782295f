"""Twenty steps of each method against peft from the same initial values: losses to 1e-4, gradient norms to 1e-3."""

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import llmtune
from tests.parity.torch_training import cosine, load_peer, token_loss, train_peer
from tests.runs import STEPS, curve, run_config, write_rows

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_dora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "vera": VeraConfig(r=16, target_modules=LINEAR, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", ["dora", *(pytest.param(own, marks=pytest.mark.nightly) for own in ("ia3", "vera"))])
def test_it_follows_peft_from_the_same_adapter(stories, batches, tmp_path, method):
    torch.manual_seed(0)
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(stories), METHODS[method])
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name or "lambda_b" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    fresh.save_pretrained(tmp_path / "adapter")
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    adapt = {"method": method, "from": str(tmp_path / "adapter")}
    losses, norms = curve(run_config(tmp_path, stories, data, adapt=adapt))
    model = load_peer(stories, tmp_path / "adapter")
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
    assert abs(losses[-1] - losses[0]) > 1e-3

    tokens = torch.tensor(batches[0][0])
    base = AutoModelForCausalLM.from_pretrained(stories)
    exported = PeftModel.from_pretrained(base, tmp_path / "run/export/adapter").eval()
    with torch.no_grad():
        theirs = exported(tokens).logits.numpy()
    np.testing.assert_allclose(llmtune.load(tmp_path / "run").logits(tokens.numpy()), theirs, atol=1e-4)
    merged = llmtune.load(tmp_path / "run/export/model")
    np.testing.assert_allclose(merged.logits(tokens.numpy()), theirs, atol=1e-4)


def test_lora_plus_trains_b_at_its_own_rate(stories, batches, tmp_path):
    """Against torch's parameter groups."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(stories), settings).save_pretrained(tmp_path / "adapter")
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    optimizer = {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "clip_norm": None,
    }
    adapt = {"from": str(tmp_path / "adapter"), "b_rate": 16.0}
    train = {"steps": 6, "batch_size": 4, "dtype": "float32"}
    losses, _ = curve(run_config(tmp_path, stories, data, adapt=adapt, optimizer=optimizer, train=train))
    model = load_peer(stories, tmp_path / "adapter")
    groups = {
        rate: [p for n, p in model.named_parameters() if side in n] for side, rate in (("lora_A", 1), ("lora_B", 16))
    }
    torch_optimizer = torch.optim.AdamW(
        [{"params": own, "lr": 1e-3 * rate} for rate, own in groups.items()], weight_decay=0.1
    )

    peer = []
    for tokens, labels in list(zip(*batches, strict=True))[:6]:
        loss = token_loss(model, tokens, labels)
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        peer.append(loss.item())
    np.testing.assert_allclose(losses, peer, rtol=1e-4)
