"""The command starts itself anew with large pages, once, with all that it was told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune import huge_pages

SHOW = """
import json, os, sys
from pathlib import Path
from llmtune import huge_pages
huge_pages.PAGES = Path(sys.argv[1])
print(os.getpid())
sys.stdout.flush()
if sys.argv[2] == "scrubbed":
    os.environ.pop("GLIBC_TUNABLES", None)
if sys.argv[2] == "nowhere":
    sys.executable = "/nowhere/python"
huge_pages.restart_with_huge_pages()
print(json.dumps([os.getpid(), sys.argv, os.environ.get("GLIBC_TUNABLES", ""), sys.flags.dev_mode]))
"""


def started(tmp_path: Path, pages: str, first: str = "two words", **environment: str) -> tuple[list[str], list]:
    """The process ids that were printed, and what the last start saw."""
    page, script = tmp_path / "enabled", tmp_path / "show.py"
    page.write_text(pages, encoding="ascii")
    script.write_text(SHOW, encoding="utf-8")
    base = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "dev", str(script), str(page), first, ""]
    done = subprocess.run(command, env={**base, "JAX_PLATFORMS": "cpu", **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *ids, last = done.stdout.splitlines()
    return ids, json.loads(last)


@pytest.mark.skipif(sys.platform != "linux", reason="a tunable of glibc")
def test_restarts_once_as_it_was_started(tmp_path: Path):
    ids, (process, arguments, tunables, dev) = started(
        tmp_path, "always [madvise] never\n", GLIBC_TUNABLES="glibc.malloc.check=0"
    )
    assert ids == [str(process)] * 2
    assert arguments[2:] == ["two words", ""] and dev
    assert tunables == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("pages", "environment"),
    [
        ("[always] madvise never\n", {}),
        ("always madvise [never]\n", {}),
        ("always [madvise] never\n", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}),
        ("always [madvise] never\n", {"JAX_PLATFORMS": "cuda"}),
    ],
)
def test_stays_where_it_would_not_help_or_was_decided(tmp_path: Path, pages: str, environment: dict[str, str]):
    ids, (_, _, tunables, _) = started(tmp_path, pages, **environment)
    assert len(ids) == 1 and tunables == environment.get("GLIBC_TUNABLES", "")


@pytest.mark.skipif(sys.platform != "linux", reason="a tunable of glibc")
@pytest.mark.parametrize(("first", "starts"), [("scrubbed", 2), ("nowhere", 1)])
def test_never_twice_and_never_fatal(tmp_path: Path, first: str, starts: int):
    """glibc empties the variable of programs with capabilities; an interpreter may not be where it says."""
    ids, _ = started(tmp_path, "always [madvise] never\n", first)
    assert len(ids) == starts


def test_an_accelerator_in_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(huge_pages, "_accelerators", lambda: iter([tmp_path]))
    assert not huge_pages._on_cpu()
    monkeypatch.setattr(huge_pages, "_accelerators", lambda: iter([]))
    assert huge_pages._on_cpu()
