"""What became of the data, as rows of label and value: the whole of it, and each source where there are several."""

from dataclasses import dataclass
from typing import Any

from llmtune.evaluation.report import units
from llmtune.evaluation.report.record import Record

Rows = list[tuple[str, str]]
PARTS = {"train": "Training", "validation": "Validation"}
COUNTED = ("rows", "examples", "tokens", "targets", "split", "truncated", "dropped", "skipped")
LOST = ("split", "truncated", "dropped", "skipped")
SOURCE = ("format", "template", "weight")


@dataclass(frozen=True)
class DataPart:
    """Training or validation data, or one source of them: counts by name, and hashes."""

    name: str
    counts: Rows
    sha256: str


def data_parts(record: Record) -> list[DataPart]:
    """Training and validation data, each followed by its sources where it has several."""
    facts, parts = record.facts.get("data", {}), []
    for key, name in PARTS.items():
        part = facts.get(key)
        if part is not None:
            parts.append(DataPart(name, _counts(part["counts"]), part.get("tokens_sha256", "")))
            sources = part.get("sources", []) if len(part.get("sources", [])) > 1 else []
            parts += [
                DataPart(f"{name}: {source.get('name', '')}", _of_source(source), source.get("sha256", ""))
                for source in sources
            ]
    return parts


def data_rows(record: Record) -> Rows:
    """What is true of the data as a whole, and where the first rows stand that were skipped."""
    facts, config = record.facts.get("data", {}), record.config["data"]
    rows = [("Training files", units.listed(config["train"]))]
    rows.append(("Validation files", units.listed(config.get("validation"))))
    rows += [("As read", note) for note in facts.get("notes", [])]
    sources = [source for key in PARTS for source in facts.get(key, {}).get("sources", [])]
    rows += [("Skipped, first ones", place) for source in sources for place in source.get("skipped_first", [])]
    return [*rows, ("sha256 of all files", facts["sha256"])] if "sha256" in facts else rows


def data_facts(record: Record) -> Rows:
    """For comparing: counts and hashes of the whole, a line for each source."""
    facts, rows = record.facts.get("data", {}), []
    for key, name in PARTS.items():
        part = facts.get(key)
        if part is not None:
            rows += [(f"{name}: {label}", value) for label, value in _counts(part["counts"])]
            rows += [(f"{name}: sha256", part.get("tokens_sha256", "")[:16])]
            for source in part.get("sources", []):
                told = [f"{label} {value}" for label, value in _of_source(source)]
                told.append(f"sha256 {source.get('sha256', '')[:16]}")
                rows.append((f"{name}: {source.get('name', '')}", ", ".join(told)))
    return [*rows, ("sha256 of all files", facts.get("sha256", "")[:16])]


def _of_source(source: dict[str, Any]) -> Rows:
    """How it was read, where that is known, and its counts."""
    read = [(name, units.listed(source[name])) for name in SOURCE if source.get(name) not in (None, 1)]
    return [*read, *_counts(source.get("counts", source))]


def _counts(counts: dict[str, Any]) -> Rows:
    """Counts in a fixed order, then any others; losses with their share of the rows, and reasons where they are given."""
    rows, whole = [], counts.get("rows") or 0
    for name in [*COUNTED, *(key for key in counts if key not in COUNTED and key not in SOURCE)]:
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
