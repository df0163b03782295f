"""The estimate of memory against what libtpu needs: points.json holds its figures, a few of them are asked for again."""

import json

import pytest

from tests.planning.points import FILE, POINTS, ask, layout_of

pytest.importorskip("libtpu")
KNOWN = json.loads(FILE.read_text())
ASKED_AGAIN = ("1b-v5e4-fsdp", "8b-v5e8-qlora")


def test_there_are_enough_points():
    assert len(KNOWN) >= 20 and set(KNOWN) <= set(POINTS)


@pytest.mark.parametrize("name", KNOWN)
def test_the_estimate_is_within_a_tenth(name):
    assert layout_of(name).memory.total == pytest.approx(KNOWN[name], rel=0.1)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ASKED_AGAIN else [pytest.mark.nightly]) for n in KNOWN]
)
def test_libtpu_still_says_the_same(name):
    assert ask(name) == pytest.approx(KNOWN[name], rel=0.02)


def test_state_is_exact():
    """Float32 weights and two moments: matrices over 256 devices, norms on each; the step's and the schedule's counters."""
    memory = layout_of("8b-v5e256-fsdp").memory
    norms = (2 * 32 + 1) * 4096
    on_each = (8_030_261_248 - norms) // 256 + norms
    assert memory.state == 12 * on_each + 8 and memory.gradients == 4 * on_each


def test_activations_fall_with_what_is_kept():
    layout = layout_of("1b-v5e16-dots")
    kept = {remat: layout.again(remat=remat).memory.kept for remat in ("block", "dots", "none")}
    rows, hidden, layers = 32 // 16, 2048, 16
    assert kept["block"] == rows * 2048 * hidden * 2 * layers < kept["dots"] < kept["none"]
    assert layout.again(microbatches=2).memory.kept == kept["dots"] // 2
