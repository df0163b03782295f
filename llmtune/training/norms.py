"""Gradient norms by the part of the model that a weight belongs to.

layers/0/attention/q/kernel/a  ->  grad_norm/attention
"""

from typing import Any

import jax
import optax

from llmtune.weights import path_name

PARTS = {"norm": "norms", "embed": "embedding", "head": "head", "attention": "attention", "mlp": "mlp"}


def part_of(path: str) -> str:
    """The part that a path names; `other` (virtual tokens, bottlenecks) where it names none."""
    return next((part for known, part in PARTS.items() if known in path), "other")


def norms_by_part(grads: Any) -> dict[str, jax.Array]:
    """`grad_norm/attention` and so on, float32 [], where gradients lie in several parts; nothing where all lie in one."""
    parts: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        parts.setdefault(part_of(path_name(path)), []).append(leaf)
    return {f"grad_norm/{part}": optax.tree.norm(leaves) for part, leaves in sorted(parts.items()) if len(parts) > 1}
