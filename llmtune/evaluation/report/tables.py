"""Facts as rows of label and value: what the page shows in tables, and what two runs differ in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.config_file import flat
from llmtune.evaluation.report import units
from llmtune.evaluation.report.record import MOMENTS, Record
from llmtune.evaluation.report.verdict import perplexity_bounds, progress

Rows = list[tuple[str, str]]
SETTLING = 3  # first steps that throughput leaves out: caches fill
COUNTED = ("rows", "examples", "tokens", "targets", "split", "truncated", "dropped", "skipped")
LOST = ("split", "truncated", "dropped", "skipped")


@dataclass(frozen=True)
class Tile:
    """A figure to be seen at once: `value` large, `note` small below."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class DataPart:
    """Training or validation data, or one source of them: counts by name, and hashes."""

    name: str
    counts: Rows
    sha256: str


def tiles(record: Record) -> list[Tile]:
    """The few figures of a run, as far as it has them."""
    found = []
    for moment, held_out in zip(MOMENTS, (record.before, record.after), strict=True):
        if held_out is not None:
            value, bounds = held_out.perplexity, perplexity_bounds(held_out)
            interval = (
                f"{units.CONFIDENCE} {units.span(bounds, value)}"
                if bounds
                else f"{units.count(held_out.tokens, 'token')}"
            )
            found.append(Tile(f"Perplexity {moment}", units.figure(value), interval))
    _, losses = record.series("loss")
    if len(losses):
        found.append(Tile("Training loss", units.figure(float(losses[-1])), f"from {units.figure(float(losses[0]))}"))
    speed = throughput(record)
    if speed is not None:
        found.append(Tile("Tokens per second", units.figure(speed[0]), f"{units.duration(speed[1])} a step"))
    if record.sessions:
        compiled = sum(session.get("compile_seconds", 0) for session in record.sessions)
        note = f"{units.duration(compiled)} of it compiling" if compiled else progress(record)
        found.append(Tile("Wall time", units.duration(wall_seconds(record)), note))
        host, device = peak(record, "peak_host_bytes"), peak(record, "peak_device_bytes")
        found.append(
            Tile("Peak memory", units.size(device or host), f"device; host {units.size(host)}" if device else "host")
        )
    return found


def throughput(record: Record) -> tuple[float, float] | None:
    """(tokens per second, seconds per step): medians over the steps, without the first few."""
    steps = [(row["tokens_per_second"], row["tokens"]) for row in record.rows if row.get("tokens_per_second")]
    steps = steps[SETTLING:] or steps
    if not steps:
        return None
    return float(np.median([speed for speed, _ in steps])), float(
        np.median([tokens / speed for speed, tokens in steps])
    )


def wall_seconds(record: Record) -> float:
    """Of all sessions, evaluation and export included."""
    return sum(session.get("seconds", 0) for session in record.working_sessions or record.sessions)


def peak(record: Record, name: str) -> float:
    """The largest of all sessions; 0 where it is not known."""
    return max((session.get(name) or 0 for session in record.sessions), default=0)


def speed_rows(record: Record) -> Rows:
    """Time, throughput, memory."""
    rows: Rows = [("Steps", progress(record) if not record.finished else f"{record.last_step:,}")]
    tokens = sum(row["tokens"] for row in record.rows)
    rows.append(("Tokens trained on", f"{tokens:,} ({sum(row['target_tokens'] for row in record.rows):,} targets)"))
    speed = throughput(record)
    if speed is not None:
        rows += [("Tokens per second, median", f"{speed[0]:,.0f}"), ("Step time, median", units.duration(speed[1]))]
    if record.sessions:
        compiles = [units.duration(s["compile_seconds"]) for s in record.sessions if "compile_seconds" in s]
        rows += [
            ("Compiling the train step", ", ".join(compiles) or "not yet"),
            ("Wall time", units.duration(wall_seconds(record))),
            ("Peak memory of the host process", units.size(peak(record, "peak_host_bytes"))),
            (
                "Peak memory of a device",
                units.size(on) if (on := peak(record, "peak_device_bytes")) else "not reported by this platform",
            ),
        ]
    return rows


def session_rows(record: Record) -> Rows:
    """When it ran, and how each session ended."""
    rows = []
    for session in record.sessions:
        span = session["started"].replace("T", " ").replace("+00:00", " UTC")
        where = f"from step {session.get('first_step', 0):,}" if session.get("first_step") else ""
        ended = {"running": "not ended"}.get(session["outcome"], session["outcome"])
        rows.append((span, ", ".join(filter(None, [where, ended, units.duration(session.get("seconds", 0))]))))
    return rows


def model_rows(record: Record) -> Rows:
    """What was trained."""
    facts = record.facts.get("model", {})
    rows = {"Model": record.config["model"], "Architecture": facts.get("architecture")}
    if facts:
        total, trained = facts["parameters"], facts["trainable_parameters"]
        full = trained == total
        rows |= {
            "Parameters": f"{total:,}",
            "Parameters that train": "all" if full else f"{trained:,} ({units.share(trained, total)})",
            "Layers": f"{facts['layers']}",
            "Hidden size": f"{facts['hidden_size']:,}",
            "Attention heads": f"{facts['heads']} ({facts['kv_heads']} key/value)",
            "Vocabulary": f"{facts['vocabulary']:,}",
        }
    return [(name, str(value)) for name, value in rows.items() if value is not None]


def environment_rows(record: Record) -> Rows:
    """Versions and devices of the last session."""
    if not record.sessions:
        return []
    session = record.sessions[-1]
    devices = session["devices"]
    mesh = " \N{MULTIPLICATION SIGN} ".join(f"{axis} {size}" for axis, size in devices["mesh"].items())
    processes = f", {devices['processes']} processes" if devices["processes"] > 1 else ""
    return [
        ("Devices", f"{devices['count']} \N{MULTIPLICATION SIGN} {devices['kind']} ({devices['platform']}){processes}"),
        ("Mesh", f"{mesh}, strategy {devices['strategy']}"),
        *((name, str(value)) for name, value in session["versions"].items()),
    ]


def data_parts(record: Record) -> list[DataPart]:
    """Training and validation data, each followed by its sources where they are recorded one by one."""
    facts, parts = record.facts.get("data", {}), []
    for key, name in (("train", "Training"), ("validation", "Validation")):
        part = facts.get(key)
        if part is not None:
            parts.append(DataPart(name, _counts(part["counts"]), part.get("tokens_sha256", "")))
            parts += [
                DataPart(str(source.get("name", "")), _counts(source.get("counts", source)), source.get("sha256", ""))
                for source in part.get("sources", [])
            ]
    return parts


def data_rows(record: Record) -> Rows:
    """What is true of the data as a whole."""
    facts, config = record.facts.get("data", {}), record.config["data"]
    rows = [("Training files", _listed(config["train"])), ("Validation files", _listed(config.get("validation")))]
    rows += [("As read", note) for note in facts.get("notes", [])]
    return [*rows, ("sha256 of all files", facts["sha256"])] if "sha256" in facts else rows


def config_rows(record: Record) -> Rows:
    """Every key, as resolved."""
    return [(key, _listed(value)) for key, value in flat(record.config).items()]


def differences(one: Record, other: Record) -> list[tuple[str, str, str]]:
    """(what, in one, in the other) of configuration, data, model, versions and devices, where they differ."""
    parts: list[Callable[[Record], Iterable[tuple[str, str]]]] = [
        config_rows,
        model_rows,
        _data_facts,
        environment_rows,
    ]
    found = {}
    for part in parts:
        left, right = dict(part(one)), dict(part(other))
        for name in {**left, **right}:
            if left.get(name) != right.get(name) and name not in ("output", "Model"):
                found[name] = (left.get(name, "\N{EM DASH}"), right.get(name, "\N{EM DASH}"))
    return [(name, *pair) for name, pair in found.items()]


def _data_facts(record: Record) -> Rows:
    rows = [(f"{part.name}: {name}", value) for part in data_parts(record) for name, value in part.counts]
    rows += [(f"{part.name}: sha256", part.sha256[:16]) for part in data_parts(record)]
    return [*rows, ("sha256 of all files", record.facts.get("data", {}).get("sha256", "")[:16])]


def _counts(counts: dict[str, Any]) -> Rows:
    """Counts in a fixed order, then any others; losses with their share of the rows, and reasons where they are given."""
    rows, whole = [], counts.get("rows") or 0
    for name in [*COUNTED, *(key for key in counts if key not in COUNTED)]:
        value = counts.get(name)
        reasons = ""
        if isinstance(value, dict):
            reasons = "; ".join(f"{reason} {number:,}" for reason, number in value.items())
            value = sum(value.values())
        if not isinstance(value, int) or (name in LOST and not value and name != "dropped" and name != "truncated"):
            continue
        text = f"{value:,}"
        text += f" ({units.share(value, whole)})" if name in LOST and value else ""
        rows.append((name, f"{text} {reasons}".rstrip()))
    return rows


def _listed(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case list():
            return "\n".join(map(str, value)) if value else "none"
        case dict():
            return ", ".join(f"{key}: {own}" for key, own in value.items()) or "none"
    return str(value)
