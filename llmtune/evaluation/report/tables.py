"""Facts as rows of label and value: what the page shows in tables, and what two runs differ in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from llmtune.config.file import flat
from llmtune.evaluation.report import units
from llmtune.evaluation.report.data_tables import data_facts
from llmtune.evaluation.report.record import MOMENTS, Record
from llmtune.evaluation.report.spending import spending
from llmtune.evaluation.report.verdict import perplexity_bounds, progress

Rows = list[tuple[str, str]]
SETTLING = 3  # first steps that throughput leaves out: caches fill


@dataclass(frozen=True)
class Tile:
    """A figure to be seen at once: `value` large, `note` small below."""

    label: str
    value: str
    note: str


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
    speed, used = throughput(record), record.series("mfu")[1]
    if len(used):
        found.append(Tile("Of the chip's peak", f"{float(np.median(used)):.1%}", "model FLOPs (MFU), median"))
    if speed is not None:
        found.append(Tile("Tokens per second", units.figure(speed[0]), f"{units.duration(speed[1])} a step"))
    time = spending(record)
    if time is not None:
        note = f"of {units.duration(time.wall)} in all"
        found.append(Tile("Goodput", f"{time.goodput:.0%}", note))
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
    added = [token for key in ("add_tokens", "add_special_tokens") for token in record.config["data"].get(key) or ()]
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
            "Tokens added to it": units.listed(added) if added else None,
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


def config_rows(record: Record) -> Rows:
    """Every key, as resolved."""
    return [(key, units.listed(value)) for key, value in flat(record.config).items()]


def differences(one: Record, other: Record) -> list[tuple[str, str, str]]:
    """(what, in one, in the other) of configuration, data, model, versions and devices, where they differ."""
    parts: list[Callable[[Record], Iterable[tuple[str, str]]]] = [
        config_rows,
        model_rows,
        data_facts,
        environment_rows,
    ]
    found = {}
    for part in parts:
        left, right = dict(part(one)), dict(part(other))
        for name in {**left, **right}:
            if left.get(name) != right.get(name) and name not in ("output", "Model"):
                found[name] = (left.get(name, "\N{EM DASH}"), right.get(name, "\N{EM DASH}"))
    return [(name, *pair) for name, pair in found.items()]
