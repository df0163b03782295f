"""The pages: facts through a Jinja template into one file that needs no network and runs no script.

Prompts, completions and configurations are untrusted text. Everything is escaped; the page forbids itself scripts and
connections besides; and control characters are shown instead of obeyed.
"""

import functools
from pathlib import Path
from typing import Any

import jinja2

from llmtune.errors import LlmtuneError
from llmtune.evaluation.report import data_tables, tables, units
from llmtune.evaluation.report.curves import comparison_charts, run_charts
from llmtune.evaluation.report.record import Record, read_record
from llmtune.evaluation.report.spending import spending
from llmtune.evaluation.report.verdict import compare, judge

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, finished or not, as it is on disk; default: its report.html. Returns the path.

    Raises LlmtuneError where `run` is no run, or the page cannot be written.
    """
    record = read_record(run)
    return _write(Path(output) if output else record.path / "report.html", run_page(record))


def write_comparison(run: str | Path, other: str | Path, output: str | Path | None = None) -> Path:
    """Write a page that compares two runs, A and B; default: into the first. Raises as `write_report` does."""
    one, two = read_record(run), read_record(other)
    return _write(Path(output) if output else one.path / f"comparison-with-{two.name}.html", comparison_page(one, two))


def run_page(record: Record) -> str:
    """HTML of one run."""
    return _template("run.html").render(
        record=record,
        title=record.name,
        subtitle=_subtitle(record),
        remarks=judge(record),
        tiles=tables.tiles(record),
        charts=run_charts(record),
        samples=_samples(record),
        time=spending(record),
        data_parts=data_tables.data_parts(record),
        data_rows=data_tables.data_rows(record),
        sections=[
            ("Time and memory", tables.speed_rows(record)),
            ("Model", tables.model_rows(record)),
            ("Environment", tables.environment_rows(record)),
            ("Sessions", tables.session_rows(record)),
        ],
        config_rows=tables.config_rows(record),
    )


def comparison_page(one: Record, other: Record) -> str:
    """HTML of two runs."""
    return _template("comparison.html").render(
        title=f"{one.name} and {other.name}",
        runs=[("A", one, _subtitle(one), judge(one)), ("B", other, _subtitle(other), judge(other))],
        remarks=compare(one, other),
        figures=_figures(one, other),
        charts=comparison_charts(one, other),
        differences=tables.differences(one, other),
        samples=_paired_samples(one, other),
    )


def _figures(one: Record, other: Record) -> list[tuple[str, tuple[str, str], tuple[str, str]]]:
    """(label, A's value and note, B's), of every figure that either has."""
    left, right = ({tile.label: (tile.value, tile.note) for tile in tables.tiles(record)} for record in (one, other))
    absent = ("\N{EM DASH}", "")
    return [(label, left.get(label, absent), right.get(label, absent)) for label in {**left, **right}]


def _subtitle(record: Record) -> list[str]:
    config, facts = record.config, record.facts.get("model", {})
    adapt = config.get("adapt") or []
    method = " + ".join(map(_method, adapt if isinstance(adapt, list) else [adapt])) or "full fine-tuning"
    sizes = [units.parameters(facts[name]) for name in ("trainable_parameters", "parameters") if name in facts]
    trained = f"{sizes[0]} of {sizes[-1]} parameters train" if sizes else ""
    last = record.sessions[-1] if record.sessions else {}
    ended = (last.get("ended") or "").replace("T", " ").replace("+00:00", " UTC")
    return list(filter(None, [str(config["model"]), config.get("objective"), method, trained, ended]))


def _method(section: dict[str, Any]) -> str:
    """`lora, rank 8`, of one section of `adapt`."""
    name, rank = section.get("method", "lora"), section.get("rank")
    return name if rank is None else f"{name}, rank {rank}"


def _samples(record: Record) -> list[tuple[str, str | None, list[tuple[str, str]], str | None]]:
    """(prompt, completion before, those on the way with their steps, after); None where it was not sampled (yet)."""
    before, after = (_by_prompt(record, moment) for moment in ("before", "after"))
    way: dict[str, list[tuple[str, str]]] = {}
    for row in record.sampled:
        way.setdefault(row["prompt"], []).append((f"Step {row['step']:,}", row["completion"]))
    return [(prompt, before.get(prompt), way.get(prompt, []), after.get(prompt)) for prompt in {**before, **after}]


def _paired_samples(one: Record, other: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(label, completion)]) of the prompts that either run has; what is the same before is shown once."""
    found = []
    first, second = ({m: _by_prompt(record, m) for m in ("before", "after")} for record in (one, other))
    for prompt in {**first["before"], **first["after"], **second["before"], **second["after"]}:
        before = first["before"].get(prompt), second["before"].get(prompt)
        labels = (
            [("Before", before[0])] if before[0] == before[1] else [("A before", before[0]), ("B before", before[1])]
        )
        labels += [("A after", first["after"].get(prompt)), ("B after", second["after"].get(prompt))]
        found.append((prompt, [(label, text) for label, text in labels if text is not None]))
    return found


def _by_prompt(record: Record, moment: str) -> dict[str, str]:
    return {sample["prompt"]: sample["completion"] for sample in record.samples(moment)}


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    return environment.get_template(name)


def _visible(value: Any) -> Any:
    """Control characters as their pictures (a NUL is no HTML), lone surrogates as the replacement character."""
    if type(value) is not str:
        return value
    return value.translate(PICTURES).encode("utf-8", "replace").decode("utf-8")


PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def _write(path: Path, page: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LlmtuneError(f"{path}: the report cannot be written ({error.strerror}); give another --output") from None
    return path
