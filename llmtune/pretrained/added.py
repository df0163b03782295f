"""Families of adapters that add to the computation: virtual tokens, bottlenecks, their fusion.

The rows of `llmtune.pretrained.adapters.FAMILIES` for them, and what a row is.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert import peft
from checkpoints_convert.peft import bottleneck, virtual
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.pretrained.saving import on_host
from llmtune.transforms import Transform, fusion_from, parallel_from, prefix_from, prompt_from, sequential_from
from llmtune.weights import (
    Bottleneck,
    Branch,
    EncodedPrompt,
    Fusion,
    Parallel,
    Prefix,
    Prompt,
    RecurrentPrompt,
    VirtualPrompt,
)

Weights = Mapping[str, Any]  # arrays and operators, by path


class Family(NamedTuple):
    """`given`: (values as read, dropout) -> the transform that puts them in; `collect`: weights -> values, None where none."""

    given: Callable[[Any, float], Transform]
    collect: Callable[[Weights], Any]


def _prompt_given(values: virtual.Prompt, dropout: float) -> Transform:
    del dropout
    return prompt_from(values.table)


def _prompt_collect(*kinds: type[VirtualPrompt]) -> Callable[[Weights], virtual.Prompt | None]:
    """What a filling of one of these kinds comes to: the vectors themselves."""

    def collect(weights: Weights) -> virtual.Prompt | None:
        prompt = weights.get("prompt")
        return virtual.Prompt(on_host(prompt.vectors())) if isinstance(prompt, kinds) else None

    return collect


def _prefix_given(values: virtual.Prefix, dropout: float) -> Transform:
    del dropout
    return prefix_from({"k": values.k, "v": values.v})


def _prefix_collect(weights: Weights) -> virtual.Prefix | None:
    found = [own for own in weights.values() if isinstance(own, Prefix)]
    return virtual.Prefix(on_host(found[0].k), on_host(found[0].v)) if found else None


def _sequential_given(values: bottleneck.Branches, dropout: float) -> Transform:
    del dropout
    return sequential_from(values.fields)


def _sequential_collect(weights: Weights) -> bottleneck.Branches | None:
    found = {path: _branch(own.branch) for path, own in weights.items() if isinstance(own, Bottleneck)}
    return bottleneck.Branches(found, {}) if found else None


def _parallel_given(values: bottleneck.Branches, dropout: float) -> Transform:
    del dropout
    return parallel_from(values.fields, values.scales)


def _parallel_collect(weights: Weights) -> bottleneck.Branches | None:
    found = {path: own for path, own in weights.items() if isinstance(own, Parallel)}
    branches = {path: _branch(own.branch) for path, own in found.items()}
    return bottleneck.Branches(branches, {path: on_host(own.scale) for path, own in found.items()}) if found else None


def _fusion_given(values: bottleneck.Branches, dropout: float) -> Transform:
    del dropout
    return fusion_from(values.fields)


def _fusion_collect(weights: Weights) -> bottleneck.Branches | None:
    found = {path: own for path, own in weights.items() if isinstance(own, Fusion)}
    heads = {path: {name: on_host(getattr(own, name)) for name in bottleneck.HEADS} for path, own in found.items()}
    every = {path: {**_branch(own.branches), **heads[path]} for path, own in found.items()}
    return bottleneck.Branches(every, {}) if found else None


def _branch(branch: Branch) -> dict[str, np.ndarray]:
    return {field.name: on_host(getattr(branch, field.name)) for field in fields(branch)}


ADDED: dict[str, Family] = {
    "PROMPT_TUNING": Family(_prompt_given, _prompt_collect(Prompt)),
    "P_TUNING": Family(_prompt_given, _prompt_collect(EncodedPrompt, RecurrentPrompt)),
    "PREFIX_TUNING": Family(_prefix_given, _prefix_collect),
    "LLMTUNE_SEQUENTIAL": Family(_sequential_given, _sequential_collect),
    "LLMTUNE_PARALLEL": Family(_parallel_given, _parallel_collect),
    "LLMTUNE_FUSION": Family(_fusion_given, _fusion_collect),
}


def read_branches(path: str | Path, config: ModelConfig) -> Mapping[str, Mapping[str, np.ndarray]]:
    """The values of a sequential adapter in a directory, by the path of the projection that each branch follows."""
    adapter = peft.read_adapter(Path(path), config)
    if adapter.method != "LLMTUNE_SEQUENTIAL":
        raise LlmtuneFormatError(
            f"{path}: its method is {adapter.method}; fusion is of adapters that method houlsby or pfeiffer trained"
        )
    return adapter.values.fields


def added_name(adapter: peft.Adapter) -> str | None:
    """The name that a configuration has for a method of this page; None for one that it calls as PEFT does."""
    if adapter.method == "LLMTUNE_SEQUENTIAL":
        return "houlsby" if any("/attention/" in path for path in adapter.values.fields) else "pfeiffer"
    return {"LLMTUNE_PARALLEL": "parallel_adapter", "LLMTUNE_FUSION": "fusion"}.get(adapter.method)
