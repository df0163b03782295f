"""Real data, each side with its own tokenizer, order and batches: held-out losses end within 2 % of the peer's.

The peer is transformers (+ peft), its own tokenizer, one padded example per row, torch's AdamW.
"""

import itertools
import json
import random

import jax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune
from tests.parity.torch_training import cosine

RATE, WARMUP, LIMIT = 1e-3, 5, 256
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"small": (60, 4, 240, 40), "whole": (400, 8, 7000, 400)}  # steps, batch size, training rows, held-out rows


def gsm8k(assets, train, held_out):
    """[(prompt, completion)] twice."""
    lines = (assets / "data" / "gsm8k_train.jsonl").read_text().splitlines()[: train + held_out]
    rows = [(row["question"] + "\n", row["answer"]) for row in map(json.loads, lines)]
    return rows[:train], rows[train:]


def shakespeare(assets, train, held_out):
    """Two texts: rows of 256 tokens are about 500 characters."""
    text = (assets / "data" / "tinyshakespeare.txt").read_text()
    cut = min(train * 500, int(len(text) * 0.9))
    return text[:cut], text[cut : cut + held_out * 500]


def write(directory, name, part):
    if isinstance(part, str):
        path = directory / f"{name}.txt"
        path.write_text(part)
    else:
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in part))
    return str(path)


def ours(directory, model, parts, adapt, steps, batch_size):
    train, held_out = (write(directory, name, part) for name, part in zip(("train", "validation"), parts, strict=True))
    text = isinstance(parts[0], str)
    tree = {
        "model": str(model), "output": str(directory / "run"), "objective": "pretrain" if text else "sft",
        "data": {"train": train, "validation": held_out, "sequence_length": LIMIT, "packing": text},
        "adapt": {"rank": 8, "alpha": 16} if adapt else None,
        "optimizer": {"learning_rate": RATE, "schedule": "cosine", "warmup_steps": WARMUP, "clip_norm": 1.0},
        "train": {"steps": steps, "batch_size": batch_size, "dtype": "float32", "remat": "none"},
        "evaluate": {"every": None},
    }  # fmt: skip
    config = directory / "run.yaml"
    config.write_text(json.dumps(tree))
    summary = llmtune.train(llmtune.load_run(config), devices=jax.devices()[:1])
    return summary.before.loss, summary.after.loss


def peer_examples(tokenizer, part):
    """[(ids, labels)], cut at LIMIT tokens as the configuration of our run says."""
    if isinstance(part, str):
        ids = [*tokenizer(part).input_ids, tokenizer.eos_token_id]
        pieces = [ids[at : at + LIMIT] for at in range(0, len(ids) - 1, LIMIT)]
        return [(piece, piece) for piece in pieces]
    examples = []
    for prompt, completion in part:
        first = tokenizer(prompt).input_ids
        rest = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids, labels = (first + rest)[:LIMIT], ([-100] * len(first) + rest)[:LIMIT]
        if any(label != -100 for label in labels[1:]):
            examples.append((ids, labels))
    return examples


def pad(examples):
    width = max(len(ids) for ids, _ in examples)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    return tokens, labels


def sums(model, examples):
    tokens, labels = pad(examples)
    logits, targets = model(tokens).logits[:, :-1], labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
    return loss, (targets != -100).sum()


def peer(directory, parts, adapt, steps, batch_size):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapt:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    train, held_out = (peer_examples(tokenizer, part) for part in parts)

    def held_out_loss():
        with torch.no_grad():
            parts = [sums(model, held_out[at : at + 8]) for at in range(0, len(held_out), 8)]
        return float(sum(loss for loss, _ in parts) / sum(count for _, count in parts))

    before = held_out_loss()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    schedule, rng, order = cosine(steps, WARMUP), random.Random(0), []
    for step in range(steps):
        if len(order) < batch_size:
            order += rng.sample(range(len(train)), len(train))
        rows, order = order[:batch_size], order[batch_size:]
        loss, count = sums(model, [train[row] for row in rows])
        optimizer.param_groups[0]["lr"] = RATE * schedule(step)
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    return before, held_out_loss()


BY_DAY = ((gsm8k, True, "small"), (shakespeare, False, "small"))  # either kind of data, either kind of training
GRID = [
    pytest.param(*case, id=f"{case[0].__name__}-{'lora' if case[1] else 'full'}-{case[2]}",
                 marks=[] if case in BY_DAY else [pytest.mark.nightly])
    for case in itertools.product((gsm8k, shakespeare), (False, True), SIZES)
]  # fmt: skip


@pytest.mark.parametrize(("data", "adapt", "size"), GRID)
def test_held_out_loss_ends_where_the_peers_does(assets, stories, tmp_path, data, adapt, size):
    steps, batch_size, *rows = SIZES[size]
    parts = data(assets, *rows)
    before, after = ours(tmp_path, stories, parts, adapt, steps, batch_size)
    peer_before, peer_after = peer(stories, parts, adapt, steps, batch_size)
    print(f"held-out loss: llmtune {before:.4f} -> {after:.4f}, peer {peer_before:.4f} -> {peer_after:.4f}")
    assert before == pytest.approx(peer_before, rel=1e-4)
    assert after == pytest.approx(peer_after, rel=0.02)
    assert after < before - 0.3
