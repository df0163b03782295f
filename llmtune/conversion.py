"""`llmtune convert`: one checkpoint layout into another, and the proof that it is still the same model.

convert("Meta-Llama-3-8B", "llama3-8b")                           Meta's or Mistral's own layout -> Hugging Face's
convert("llama3-8b", "llama3-8b-meta", to="meta", files=8)        and back, in tensor-parallel files
convert("llama3-8b", "small", max_shard_size="500MB", verify=True)
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmtune import pretrained
from llmtune.errors import LlmtuneConfigError, LlmtuneFormatError
from llmtune.model import DTYPES, Model, build_params
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.shipped import resolve
from llmtune.transforms import chain

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHARD_SIZE = "5GB"
TOKENS = 64  # positions at which logits are compared
SHARE = 0.4  # of the memory that is free may be taken by a model whose logits are compared


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "hf",
    source_layout: str | None = None,
    max_shard_size: str = SHARD_SIZE,
    files: int = 1,
    dtype: str | None = None,
    rope_scaling_factor: float | None = None,
    like: str | None = None,
    verify: bool = False,
    begin: Callable[[str, int], None] = lambda name, total: None,
    progress: pretrained.Progress = lambda done: None,
) -> list[str]:
    """Write `target`, complete or not at all; gives lines that say what was done.

    `verify` reads the result back before it takes its name and compares every tensor's digest with the source's and, where
    the model fits into memory, logits. Raises LlmtuneError for whatever does not fit exactly.
    """
    if dtype is not None and dtype not in DTYPES:
        raise LlmtuneConfigError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if files != 1 and to != "meta":
        raise LlmtuneConfigError(f"--files {files}: only Meta's layout has tensor-parallel files; add --to meta")
    if max_shard_size != SHARD_SIZE and to == "meta":
        raise LlmtuneConfigError("--max-shard-size: Meta's layout has no shards of a chosen size; give --files")
    plan = pretrained.conversion_plan(
        to=to,
        source_layout=source_layout,
        max_shard_bytes=parse_size(max_shard_size),
        files=files,
        dtype=dtype,
        rope_factor=rope_scaling_factor,
        like=like,
    )
    said: list[str] = []

    def compare(one: pretrained.Source, other: pretrained.Source) -> None:
        said.append(compare_logits(one, other, same_dtype=dtype is None))

    report = pretrained.convert(
        resolve(str(source)), Path(target), plan, verify=compare if verify else None, begin=begin, progress=progress
    )
    lines = [f"note: {note}" for note in report.notes]
    lines.append(f"{target}: {report.tensors} tensors, {report.nbytes / 1e9:.3f} GB, {report.source_layout} -> {to}")
    if report.digest is not None:
        lines.append(f"verified: all tensors read back bit by bit (SHA-256 over their digests {report.digest})")
    return lines + said


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1GiB" or "1000000"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or not 1 <= float(found[1]) * UNITS[found[2].upper()] < 2**63:
        raise LlmtuneConfigError(f"--max-shard-size: {text!r} is no size such as 5GB, 500MB or 1GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def compare_logits(one: pretrained.Source, other: pretrained.Source, *, same_dtype: bool) -> str:
    """The float32 logits of both on fixed tokens, one model in memory at a time; a line that says how they compare.

    Raises LlmtuneFormatError where they should be equal and are not.
    """
    needed, free = 4 * one.elements, free_memory()
    if needed > SHARE * free:
        return f"logits: not compared, {needed / 1e9:.1f} GB of float32 weights do not fit beside others into {free / 1e9:.1f} GB"
    tokens = np.random.default_rng(0).integers(0, one.config.vocab_size, (1, TOKENS))
    ours, theirs = logits(one, tokens), logits(other, tokens)
    gap = float(np.max(np.abs(ours - theirs)))
    if same_dtype and not np.array_equal(ours, theirs):
        raise LlmtuneFormatError(
            f"verification failed: logits differ by up to {gap:.3g} after conversion; nothing is kept"
        )
    return f"logits: {'equal' if gap == 0 else f'largest difference {gap:.3g}'} at {TOKENS} positions"


def logits(source: pretrained.Source, tokens: np.ndarray) -> np.ndarray:
    """float32 [batch, seq, vocab] on one device."""
    graphdef, declared = declare(source.config)
    mesh = make_mesh({}, jax.devices()[:1])
    params = build_params(source, declared, chain(), mesh, REPLICATED, dtype="float32")
    bind = functools.partial(LanguageModel, graphdef, dtype=jnp.dtype("float32"))
    return Model(source.config, params, None, source, mesh, REPLICATED, bind).logits(tokens)


def free_memory() -> float:
    """Bytes that may be taken; without Linux's /proc, 8 GB."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return 1024.0 * int(found[1]) if found else 8e9
