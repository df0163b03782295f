"""Attention over rows that are cut along the sequence: keys and values come from the devices on the left.

    device           0        1        2        3
    queries          own      own      own      own
    keys, values     own      0 own    0 1 own  0 1 2 own        causal
                     own      0 own    1 own    2 own            under a window no longer than a device's part

Each device passes what it has to its right-hand neighbour, as many times as the mask reaches to the left; what arrives stands
before its own keys (`Mask.before`), so that one static mask serves all devices and any back end. Device i hides what came from
beyond the row's beginning by segment 0. Communication is that of an all-gather of keys and values, or of a window's reach;
queries never move, and nothing of [seq, seq] exists. (Liu et al. 2023, arXiv:2310.01889, pass blocks on in the same ring, and
compute as they arrive.)

The last device does the most visible work, and sets the pace under a causal mask without a window.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from llmtune.kernels.masks import Mask


def reach(mask: Mask, own: int, devices: int) -> int:
    """From how many devices to the left a mask needs keys, with `own` tokens of a row on each."""
    if not mask.causal:
        raise ValueError("attention over a row on several devices is causal")
    return devices - 1 if mask.window is None else min(devices - 1, -(-(mask.window - 1) // own))


def with_keys_on_the_left(
    attend: Callable[..., jax.Array], axis: str, q: jax.Array, *passed: jax.Array, mask: Mask, **asked: Any
) -> jax.Array:
    """What one device does: `attend(q, k, v, segments, mask=, ...)` with the keys of those on its left before its own.

    `passed`: k, v and segment ids, which go round.
    """
    devices, own = jax.lax.axis_size(axis), q.shape[1]
    steps = reach(mask, own, devices)
    ring = [(n, (n + 1) % devices) for n in range(devices)]
    parts = [passed]
    for step in range(1, steps + 1):
        passed = tuple(jax.lax.ppermute(x, axis, ring) for x in passed)
        *keys, segments = passed
        parts.append((*keys, jnp.where(jax.lax.axis_index(axis) >= step, segments, 0)))
    k, v, segments = (jnp.concatenate(x, axis=1) for x in zip(*reversed(parts), strict=True))
    return attend(q, k, v, segments, mask=replace(mask, before=steps * own), **asked)
