"""The tree is the map: small rooms with names that say what is in them."""

import ast
import re
import subprocess

import pytest

from tests.conftest import ROOT

LINES = 400
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "tools", "base"}
MACHINES = re.compile(r"(?<![\w.~:-])/(?:work|root|home|Users|mnt|tmp/dev)/(?!\w*\.\.\.)")


def tracked() -> list[str]:
    """What git knows, and what it would be told of next."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in tracked() if name.endswith(".py")}


@pytest.fixture(scope="module")
def packages(sources) -> dict[str, ast.Module]:
    return {
        name: ast.parse(text) for name, text in sources.items() if name.startswith(("llmtune/", "checkpoints_convert/"))
    }


def test_files_stay_small(sources):
    assert not {name: len(text.splitlines()) for name, text in sources.items() if text.count("\n") > LINES}


def test_names_say_what_is_inside(sources, packages):
    assert not [name for name in sources if VAGUE & set(name.removesuffix(".py").split("/"))]
    classes = [node.name for tree in packages.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(("Manager", "Helper", "Utils"))]


def test_every_module_says_what_it_is_for(sources):
    assert not [name for name, text in sources.items() if text.strip() and not ast.get_docstring(ast.parse(text))]


def test_every_folder_of_modules_is_a_package(packages):
    folders = {name.rsplit("/", 1)[0] for name in packages}
    assert not [folder for folder in sorted(folders) if f"{folder}/__init__.py" not in packages]


def test_nothing_is_asked_by_hasattr(packages):
    """What may be absent is declared as None, so that a typo is an error."""
    calls = [
        (name, node.lineno) for name, tree in packages.items() for node in ast.walk(tree) if is_call(node, "hasattr")
    ]
    assert not calls


def is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def test_no_file_names_the_machine_it_was_written_on():
    texts = {name: (ROOT / name).read_bytes() for name in tracked()}
    found = {
        name: [line.strip()[:100] for line in text.decode("utf-8").splitlines() if MACHINES.search(line)]
        for name, text in texts.items()
        if b"\0" not in text[:8192]
    }
    assert not {name: lines for name, lines in found.items() if lines}
