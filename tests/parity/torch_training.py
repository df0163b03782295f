"""The peer: transformers (+ peft) trained by torch's AdamW on given batches, one figure per step."""

import math

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def load_peer(model_directory, adapter_directory=None):
    """The model in float32; with an adapter, only its factors train."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    if adapter_directory is not None:
        model = PeftModel.from_pretrained(model, adapter_directory, is_trainable=True)
    return model


def token_loss(model, tokens, labels):
    """Mean cross-entropy over the targets of the whole batch."""
    logits = model(torch.tensor(tokens)).logits[:, :-1]
    targets = torch.tensor(labels)[:, 1:].long()
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100
    )


def loss_with_routing(model, tokens, labels):
    """The same of a mixture of experts, with what transformers adds to it."""
    return model(torch.tensor(tokens), labels=torch.tensor(labels).long(), output_router_logits=True).loss


def train_peer(model, batches, *, learning_rate, schedule, weight_decay=0.0, clip_norm=None, loss_of=token_loss):
    """[(loss, gradient norm before clipping)] over batches of (tokens, labels); `schedule(i)` scales the rate of update i."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    figures = []
    for tokens, labels in batches:
        loss = loss_of(model, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, clip_norm if clip_norm is not None else math.inf)
        optimizer.step()
        scheduler.step()
        figures.append((loss.item(), norm.item()))
    return figures


def cosine(steps, warmup):
    """transformers' get_cosine_schedule_with_warmup, as a factor."""

    def factor(i):
        if i < warmup:
            return i / warmup
        return 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, steps - warmup)))

    return factor
