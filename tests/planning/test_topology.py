"""Names of topologies: what they stand for, and what is refused."""

import pytest

from llmtune.chips import chip_of, chips
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.topology import devices, parse_topology


@pytest.mark.parametrize(
    ("name", "shape", "slices", "wraps"),
    [
        ("v5e:16x16", (16, 16), 1, (True, True)),
        ("v5e-256", (16, 16), 1, (True, True)),
        ("v5litepod-8", (2, 4), 1, (False, False)),
        ("V6e-64", (8, 8), 1, (False, False)),
        ("v5p-8", (2, 2, 1), 1, (False, False, False)),
        ("v5p-64", (2, 4, 4), 1, (False, True, True)),
        ("v5p-128", (4, 4, 4), 1, (True, True, True)),
        ("v5p-256", (4, 4, 8), 1, (True, True, True)),
        ("v4:2x2x4*2", (2, 2, 4), 2, (False, False, True)),
        ("h100:8", (1, 8), 1, (False, False)),
        ("h100:4x8", (4, 8), 1, (False, False)),
    ],
)
def test_names(name, shape, slices, wraps):
    topology = parse_topology(name)
    assert (topology.shape, topology.slices, topology.wraps) == (shape, slices, wraps)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "'v9:2x2' is not known; chips: v4, v5e, v5p"),
        ("v5e", "is not known"),
        ("v5e:2x2x2", "must have 2 sides"),
        ("v5e:32x32", "more chips than a pod"),
        ("h100:8*2", "a host of h100 has 8 GPUs; write hosts x GPUs, such as h100:2x8"),
        ("h100-16", "a host of h100 has 8 GPUs"),
        ("v5p-12", "counts 12 cores, for which no default shape is known; write the sides, e.g. v5p:4x4x4"),
    ],
)
def test_unknown_names(name, said):
    with pytest.raises(LlmtuneConfigError, match=r"^--topology: ") as refused:
        parse_topology(name)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "count"), [("v5e:2x4", 8), ("v6e:8x8", 64), ("v5p-128", 64), ("v4-8", 4), ("v5e:4x4*2", 32), ("v5e-1", 1)]
)
def test_libtpu_knows_the_same_chips(name, count):
    pytest.importorskip("libtpu")
    topology = parse_topology(name)
    found = devices(topology)
    assert len(found) == count and {chip_of(device) for device in found} == {topology.chip}


def test_a_shape_that_libtpu_does_not_take_is_one_line():
    pytest.importorskip("libtpu")
    with pytest.raises(LlmtuneConfigError, match=r"libtpu does not take v5e:3x5 .*divisible"):
        devices(parse_topology("v5e:3x5"))


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlmtuneConfigError, match=r"pip install 'llmtune\[plan\]'"):
        devices(parse_topology("v5e:2x2"))


def test_every_chip_has_its_source():
    assert all(chip.source.startswith("https://") and chip.flops > 1e14 for chip in chips().values())
    assert len({chip.kind for chip in chips().values()}) == len(chips())
