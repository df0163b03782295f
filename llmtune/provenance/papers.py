"""What lies beside exported weights: README.md (the card), NOTICE where a licence asks for it, provenance.json.

    provenance.json   {"name", "kind", "base", "license", "data", "configuration", "versions", "commit", "metrics", ...}

No secret is in any of them: they are redacted like all files of a run.
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.provenance.card import Facts, model_card
from llmtune.redaction import redact
from llmtune.shipped import PACKAGE

Papers = Facts
FORMAT = 1


def write_papers(directory: Path, kind: str, facts: Facts, base_digest: str) -> None:
    """Into a directory that holds an exported `model` or `adapter`."""
    own = facts.found.license
    agreement = next((file.name for file in sorted(directory.glob("LICENSE*"))), None)
    beside = kind == "adapter" and (directory.parent / "base").is_dir()
    _write(
        directory / "README.md",
        model_card(facts, _card_kind(directory, kind), agreement is not None, base_beside=beside),
    )
    if own.notice is not None:
        notice = directory / "NOTICE"
        given = notice.read_text(encoding="utf-8", errors="replace") if notice.is_file() else ""
        if own.notice not in given:
            _write(notice, f"{given.rstrip()}\n\n{own.notice}\n".lstrip())
    _write(directory / "provenance.json", _json(provenance(facts, kind, base_digest, agreement)))


def _card_kind(directory: Path, kind: str) -> str:
    """`own adapter` where the directory's type is one of ours, which peft refuses by name."""
    config = directory / "adapter_config.json"
    own = config.is_file() and json.loads(config.read_text("utf-8"))["peft_type"].startswith("LLMTUNE_")
    return f"own {kind}" if own else kind


def provenance(facts: Facts, kind: str, base_digest: str, agreement: str | None) -> dict[str, Any]:
    """What provenance.json holds."""
    own, run = facts.found, facts.run
    last = (run.get("sessions") or [{}])[-1]
    return {
        "format": FORMAT,
        "name": own.name,
        "kind": kind,
        "base": {"model": facts.config["model"], "sha256": base_digest, **run.get("model", {})},
        "license": {"base": own.license.key, "title": own.license.title, "known": own.how, "agreement": agreement},
        "data": run.get("data", {}),
        "continued_from": run.get("continued_from"),
        "configuration": facts.config,
        "steps": run.get("steps"),
        "metrics": {moment: _figures(facts.evaluation.get(moment, {})) for moment in ("before", "after")},
        "versions": last.get("versions", {}),
        "devices": last.get("devices", {}),
        "commit": source_commit(),
    }


def carry_papers(source: Path, target: Path, change: str) -> None:
    """Card, notice and provenance of an export to what was made from it; `change` says what was done, in a sentence."""
    for name in ("README.md", "NOTICE", "provenance.json"):
        if not (source / name).is_file() or (target / name).exists():
            continue
        text = (source / name).read_text(encoding="utf-8")
        if name == "README.md":
            text += f"\n{change}\n"
        elif name == "provenance.json":
            known = json.loads(text)
            text = _json({**known, "changes": [*known.get("changes", []), change]})
        _write(target / name, text)


def source_commit() -> str | None:
    """The commit of the checkout that llmtune runs from, with a + where files differ from it; None of an installed one."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    git = ["git", "-C", str(PACKAGE.parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


def _figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in evaluation.items() if name != "samples"}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(redact(text), encoding="utf-8")
