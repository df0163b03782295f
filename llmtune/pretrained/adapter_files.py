"""PEFT directories as files, apart from any model: whether a server takes them, of another rank, several made one.

check_adapter(path)                                   what stands in the way of vLLM
resize_adapter(path, output, config, rank)            the same adapter with one rank everywhere
combine_adapter_files(paths, output, config, ...)     adapter arithmetic (`llmtune.transforms.arithmetic`)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert import peft
from checkpoints_convert.peft import vllm
from checkpoints_convert.peft.directory import open_peft
from checkpoints_convert.peft.factors import Factors as PeftFactors
from checkpoints_convert.peft.lora import LoraValues
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import ModelConfig
from llmtune.transforms import Factors, change_rank, combine_adapters

Finding = vllm.Finding


def check_adapter(path: Path) -> list[Finding]:
    """What vLLM would refuse or misread, and how to mend it; empty where nothing."""
    return vllm.findings(open_peft(path))


def base_of(path: Path) -> str:
    """The base that an adapter names."""
    named = open_peft(path).settings.get("base_model_name_or_path")
    if not named:
        raise LlmtuneConfigError(f"{path}: it does not name its base model; give --model")
    return str(named)


def resize_adapter(path: Path, output: Path, config: ModelConfig, *, rank: int, compress: bool) -> float:
    """Write the adapter with this rank and one scale in all modules. Returns the largest relative change of a product's norm.

    Without `compress` a rank that is too small is an error: padding changes nothing but the shape.
    """
    values, base = _low_rank(path, config)
    widest = max(own.a.shape[-1] for own in values.factors.values())
    if rank < widest and not compress:
        raise LlmtuneConfigError(f"--pad-rank: {rank} is less than {widest}, which {path} has; use --compress-rank")
    factors = {name: _ours(own) for name, own in values.factors.items()}
    scale = max(float(own.scale.max()) for own in factors.values())
    resized = {name: change_rank(own, rank, scale) for name, own in factors.items()}
    _write(output, resized, config, base)
    return max(_moved(own, resized[name]) for name, own in factors.items())


def combine_adapter_files(
    paths: Sequence[Path], output: Path, config: ModelConfig, weights: Sequence[float], how: str, **more: Any
) -> None:
    """Write what `combine_adapters` makes of LoRA directories for one base. `more`: rank, density, seed."""
    read = [_low_rank(path, config) for path in paths]
    given = [{name: _ours(own) for name, own in values.factors.items()} for values, _ in read]
    _write(output, combine_adapters(given, weights, how, **more), config, read[0][1])


def _low_rank(path: Path, config: ModelConfig) -> tuple[LoraValues, str]:
    adapter = peft.read_adapter(path, config)
    if not isinstance(adapter.values, LoraValues):
        raise LlmtuneConfigError(
            f"{path}: it holds {adapter.method}; only LoRA adapters have a rank and can be combined"
        )
    if adapter.whole:
        raise LlmtuneConfigError(
            f"{path}: it brings {next(iter(adapter.whole))} in whole, which would be lost; merge it instead"
        )
    if any(own.magnitude is not None for own in adapter.values.factors.values()):
        raise LlmtuneConfigError(f"{path}: DoRA is not linear in its values; serve or merge the whole model instead")
    return adapter.values, adapter.base or ""


def _write(output: Path, factors: dict[str, Factors], config: ModelConfig, base: str) -> None:
    theirs = {name: PeftFactors(own.a, own.b, own.scale, own.ranks) for name, own in factors.items()}
    peft.write_adapter(output, "LORA", LoraValues(theirs, rslora=False), config, base=base)


def _ours(own: PeftFactors) -> Factors:
    return Factors(own.a, own.b, own.scale, own.ranks)


def _moved(before: Factors, after: Factors) -> float:
    """|difference| / |before| in the Frobenius norm, from inner products of factors: no product is formed."""

    def inner(one: Factors, other: Factors) -> float:
        scales = (one.scale * other.scale).astype("float64")
        left, right = one.a.swapaxes(-1, -2) @ other.a, one.b @ other.b.swapaxes(-1, -2)
        return float((scales * (left * right).sum(axis=(-1, -2))).sum())

    square = inner(before, before)
    difference = square - 2 * inner(before, after) + inner(after, after)
    return (max(difference, 0.0) / square) ** 0.5 if square else 0.0
