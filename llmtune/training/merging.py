"""What became of a quantised base in the merged export: which numbers the adapter was merged into, and what that moved.

    trained:  LoRA(NF4(codes), a, b)
    exported: round16(decode(codes) + scale a b)      dequantized: nearly what trained; rounding to the stored dtype is left
              round16(stored + scale a b)             original: the error that the adapter trained around is gone

`merge.json` beside the exported config.json says which, and how far the logits of the export lie from those of the trained
model, on held-out rows (or the first training rows, where nothing is held out).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.quantize import kept
from llmtune.data import HostBatch, RunData, evaluation_batches
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.training.display import Display
from llmtune.training.files import write_whole
from llmtune.training.processes import highest, is_first
from llmtune.training.program import Program

LENGTH = 128  # tokens of a row that are compared


def merge_base(run: Run, source: pretrained.Source) -> Any:
    """The `base` of `pretrained.save` that the run asks for; None: what the codes decode to."""
    original = any(own.merge_into == "original" for own in kept(run.quantize))
    return pretrained.stored_matrices(source) if original else None


def report_merge(
    run: Run, source: pretrained.Source, params: Any, program: Program, data: RunData, model: Path, display: Display
) -> dict[str, Any]:
    """Write merge.json, say it in a line, and give its content."""
    quantized = [{"base": own.base, "double": own.double, "targets": own.targets} for own in kept(run.quantize)]
    merged_into = kept(run.quantize)[0].merge_into
    facts: dict[str, Any] = {
        "merged_into": merged_into,
        "base": run.model,
        "base_sha256": source.digest,
        "quantized": quantized,
        "logits": _moved(run, params, program, data, model),
    }
    if is_first():
        write_whole(model / "merge.json", json.dumps(facts, indent=2) + "\n")
    moved = facts["logits"]
    said = "not measured: the merged model does not fit beside the run"
    if moved is not None:
        said = (
            f"on {moved['tokens']:,} tokens its logits lie {moved['rms']:.2g} (rms; {moved['largest']:.2g} at most) from those "
            f"of the trained model, KL {moved['kl']:.2g}, {moved['same_choice']:.1%} of the likeliest tokens are the same"
        )
    display.note(f"merged into the {merged_into} base; {said}")
    return facts


def _moved(run: Run, params: Any, program: Program, data: RunData, model: Path) -> dict[str, Any] | None:
    """Logits of the exported directory beside those of the trained weights, both computed in float32; None: no room."""
    source = pretrained.open_source(str(model))
    (short,) = highest([not _fits(source.weight_bytes, program)])
    if short:
        return None
    graphdef, declared = declare(source.config)
    merged = pretrained.load(source, declared, program.mesh, program.strategy, dtype=None)
    rows = program.place(_rows(run, program, data))

    @jax.jit
    def compare(trained: Any, merged: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with program.strategy.active():
            plain = replace(program.bind(merged), graphdef=graphdef)
            ours, theirs = (_log_probabilities(own, batch) for own in (program.bind(trained), plain))
        seen = (batch["segment_ids"] > 0).astype(jnp.float32)
        gap = jnp.abs(ours - theirs)
        return {
            "tokens": seen.sum(),
            "squares": (jnp.square(gap).mean(-1) * seen).sum(),
            "largest": (gap.max(-1) * seen).max(),
            "kl": ((jnp.exp(ours) * (ours - theirs)).sum(-1) * seen).sum(),
            "same_choice": ((ours.argmax(-1) == theirs.argmax(-1)) * seen).sum(),
        }

    sums = {name: float(value) for name, value in jax.device_get(compare(params, merged, rows)).items()}
    count = max(sums["tokens"], 1.0)
    return {
        "tokens": int(count),
        "rms": (sums["squares"] / count) ** 0.5,
        "largest": sums["largest"],
        "kl": max(sums["kl"] / count, 0.0),
        "same_choice": sums["same_choice"] / count,
    }


def _log_probabilities(model: LanguageModel, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [batch, seq, vocab], computed in float32. Unlike logits they have no free constant."""
    exact = replace(model, dtype=jnp.float32)
    return jax.nn.log_softmax(exact.logits(batch["tokens"], batch["positions"], batch["segment_ids"]))


def _rows(run: Run, program: Program, data: RunData) -> HostBatch:
    """One batch of this process's rows, cut to `LENGTH`."""
    dataset = data.train if data.validation is None else data.validation
    batch = evaluation_batches(dataset, run.train.batch_size, run.data.sequence_length, 1)[0]
    return {name: rows[program.own_rows, :LENGTH] for name, rows in batch.items()}


def _fits(nbytes: int, program: Program) -> bool:
    """Whether the merged model has room beside what is there, on devices that tell how much they have."""
    stats = [device.memory_stats() or {} for device in program.mesh.local_devices]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s and "bytes_in_use" in s]
    return not free or 1.5 * nbytes / program.mesh.size < min(free)
