"""The wheel, installed away from the checkout: it finds its configs and its starter model, and it generates."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

import llmtune
from tests.conftest import ROOT

PROMPTS = ["Mira the fox", "List the animals:"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(out, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("llmtune-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel alone; dependencies come from this environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(target, *pip, "--target", str(target / "site"), str(wheel))
    return target


def run(directory, *arguments, site=None):
    """In an empty folder, without the checkout on the path; an installed folder comes before an editable install."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_holds_the_two_packages_and_what_ships_with_them_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = {f"llmtune/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    modules = {
        str(path.relative_to(ROOT)) for top in ("llmtune", "checkpoints_convert") for path in (ROOT / top).rglob("*.py")
    }
    templates = ("evaluation/report", "planning")
    pages = {str(path.relative_to(ROOT)) for of in templates for path in (ROOT / f"llmtune/{of}/templates").iterdir()}
    starter = {str(path.relative_to(ROOT)) for path in (ROOT / "llmtune" / "starter").iterdir()}
    assert names == shipped | modules | starter | pages


INSIDE = """
import json, sys
import checkpoints_convert, llmtune, llmtune.pretrained
from llmtune.shipped import configs_directory, resolve
recipes = sorted((configs_directory() / "recipes").glob("*.yaml"))
presets = sorted((configs_directory() / "models").glob("*.yaml"))
quickstart = llmtune.load_run(str(configs_directory() / "recipes" / "quickstart.yaml"))
print(json.dumps({
    "homes": [llmtune.__file__, checkpoints_convert.__file__, str(configs_directory())],
    "configs": sorted(str(p.relative_to(configs_directory())) for p in configs_directory().rglob("*.yaml")),
    "ready": bool(llmtune.train and llmtune.load),
    "recipes": [llmtune.load_run(str(recipe)).objective for recipe in recipes],
    "presets": [llmtune.pretrained.open_source(preset.stem).config.architecture for preset in presets],
    "missing": [n for n in (quickstart.model, quickstart.data.train, quickstart.data.validation) if not resolve(n).exists()],
}))
"""


def test_it_finds_its_configs_away_from_the_checkout(installed):
    found = json.loads(run(installed, "-c", INSIDE, site=installed / "site"))
    assert all(home.startswith(str(installed / "site")) for home in found["homes"]), found["homes"]
    assert found["configs"] == sorted(str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*.yaml"))
    assert found["ready"] and len(found["recipes"]) >= 2 and found["presets"] and not found["missing"]


def test_its_command_generates_with_the_starter_model(installed, starter):
    script = str(installed / "site" / "bin" / "llmtune")
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    said = run(
        installed, script, "generate", "llmtune:starter", *asked, "--max-new-tokens", "12", site=installed / "site"
    )
    expected = llmtune.load(starter).generate(PROMPTS, max_new_tokens=12)
    assert said == "".join(f"{prompt}{own}\n" for prompt, own in zip(PROMPTS, expected, strict=True))
    assert all(len(own.split()) > 3 for own in expected)
    assert run(installed, script, "--version", site=installed / "site") == f"llmtune {llmtune.__version__}\n"
