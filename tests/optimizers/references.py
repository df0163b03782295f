"""Other people's optimizers on one matrix or vector at a time: (values, gradients [steps, ...]) -> values after all steps."""

import math

import numpy as np
import torch
import transformers
from bitsandbytes.functional import create_dynamic_map

RATE, DECAY = 3e-3, 0.1


def by_torch(make):
    """Any torch optimizer, given the gradients one after the other."""

    def run(values, gradients):
        weight = torch.nn.Parameter(torch.tensor(np.asarray(values)))
        optimizer = make([weight])
        for gradient in np.asarray(gradients):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
        return weight.detach().numpy()

    return run


adamw = by_torch(lambda weights: torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY))
sgd = by_torch(lambda weights: torch.optim.SGD(weights, lr=RATE, momentum=0.9, nesterov=True, weight_decay=DECAY))
plain_sgd = by_torch(lambda weights: torch.optim.SGD(weights, lr=RATE, weight_decay=DECAY))
SIGNED, UNSIGNED = (create_dynamic_map(signed).numpy() for signed in (True, False))


def adafactor(scale_parameter):
    """transformers' Adafactor under a given learning rate."""
    options = {"scale_parameter": scale_parameter, "relative_step": False, "warmup_init": False}
    return by_torch(lambda weights: transformers.Adafactor(weights, lr=RATE, weight_decay=DECAY, **options))


def adamw_8bit(values, gradients):
    """Dettmers et al. 2022, arXiv:2110.02861: bitsandbytes' table and blocks of 256, the nearest code found by search.

    (bitsandbytes itself rounds to a neighbour of the nearest code on a CPU.) What is small keeps its moments.
    """
    if np.size(values) < 4096:
        return adamw(values, gradients)
    p, codes = np.asarray(values), None
    m = v = np.zeros_like(p)
    for step, g in enumerate(np.asarray(gradients), 1):
        if codes is not None:
            m, v = (table[own] * scale for table, (own, scale) in zip((SIGNED, UNSIGNED), codes, strict=True))
            m, v = m.reshape(p.shape), v.reshape(p.shape)
        m, v = np.float32(0.9) * m + np.float32(0.1) * g, np.float32(0.999) * v + np.float32(0.001) * g * g
        root = np.sqrt(v / (1 - 0.999**step)) + 1e-8
        p = (p * (1 - RATE * DECAY) - RATE / (1 - 0.9**step) * m / root).astype(np.float32)
        codes = [nearest(table, own.reshape(-1, 256)) for table, own in ((SIGNED, m), (UNSIGNED, v))]
    return p


def nearest(table, blocks):
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    return np.abs((blocks / scale)[..., None] - table).argmin(axis=-1), scale


def lion(values, gradients):
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2, in float64."""
    p, m = np.float64(values), 0.0
    for g in np.float64(gradients):
        p = p - RATE * (np.sign(0.9 * m + 0.1 * g) + DECAY * p)
        m = 0.99 * m + 0.01 * g
    return p


def muon(adjust):
    """Jordan's Muon of a matrix [in, out], in float64; he writes matrices [out, in]."""

    def run(values, gradients):
        p, m = np.float64(values).T, 0.0
        for g in np.float64(gradients):
            m = 0.95 * m + 0.05 * g.T
            update = newton_schulz(0.95 * m + 0.05 * g.T)
            rows, columns = p.shape
            size = math.sqrt(max(1, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns))
            p = p * (1 - RATE * DECAY) - RATE * size * update
        return p.T

    return run


def newton_schulz(matrix):
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T).T
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def schedule_free(values, gradients):
    """(y, x) of Defazio et al. 2024, arXiv:2405.15682: x is kept by itself, where the code under test derives it; float64."""
    b1, b2, warmup = 0.9, 0.999, 10
    x = z = y = np.float64(values)
    v, total = 0.0, 0.0
    for step, g in enumerate(np.float64(gradients)):
        rate = RATE * min(1, step / warmup)
        v = b2 * v + (1 - b2) * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8) + DECAY * y)
        total += rate**2
        share = rate**2 / total if total else 0.0
        x = (1 - share) * x + share * z
        y = (1 - b1) * z + b1 * x
    return y, x
