"""Every recipe says how it is run and how it is planned, and lies on the chips that it names, with room."""

import shlex

import pytest

from llmtune import pretrained
from llmtune.config.file import load_run
from llmtune.planning.layout import lay_out
from llmtune.planning.topology import devices, parse_topology
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
HEADS = {path.stem: path.read_text().splitlines()[:2] for path in RECIPES}
PLANNED = {name: shlex.split(head[1][2:]) for name, head in HEADS.items() if head[1].startswith("# llmtune plan ")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_is_the_command(path):
    words = HEADS[path.stem][0].split("   ")[0].split()
    assert words[0] == "#" and (str(path.relative_to(ROOT)) in words or words[1] == "make")
    for word in words:
        assert not word.startswith("tpu_scripts/") or (ROOT / word).exists()


@pytest.mark.parametrize("name", PLANNED)
def test_it_fits_by_estimate_onto_the_chips_that_it_is_for(name):
    _, _, path, *rest = PLANNED[name]
    options = dict(zip(rest[::2], [*rest[1::2], None], strict=False))
    topology = parse_topology(options["--topology"])
    run = load_run(ROOT / path, ["--model", options["--model"]])
    layout = lay_out(run, pretrained.open_source(run.model), topology, devices(topology))
    assert layout.memory.total < 0.9 * topology.chip.hbm_bytes


def test_pods_of_each_kind_have_a_recipe():
    names = {parse_topology(words[words.index("--topology") + 1]).chip.name for words in PLANNED.values()}
    assert names >= {"v5e", "v5p", "h100"}
