"""GPUs that are not here: what stands for them without NVIDIA's plugin, and programs compiled for them with it.

The plugin has 4 GB, so that it is not among the packages of the tests; where it is installed, all of these run.
"""

import re

import pytest

from llmtune.chips import chips
from llmtune.errors import LlmtuneConfigError
from llmtune.planning import gpu_target
from llmtune.planning.ahead import compile_step
from llmtune.planning.gpu_target import StandIn, gpus, has_compiler, target_config
from llmtune.planning.plan import plan_layout
from llmtune.planning.topology import devices, parse_topology
from tests.planning.test_search import laid_out

GPUS = [name for name, chip in chips().items() if chip.target]
plugin = pytest.mark.skipif(not has_compiler(), reason="needs llmtune[plan-gpu]")


def test_stand_ins_without_the_plugin(starter, monkeypatch):
    monkeypatch.setattr(gpu_target, "has_compiler", lambda: False)
    found = devices(parse_topology("h100:2x8"))
    assert [device.process_index for device in found] == [0] * 8 + [1] * 8
    assert all(isinstance(device, StandIn) and device.device_kind == chips()["h100"].kind for device in found)
    layout = laid_out(starter, "h100:8")
    assert plan_layout(layout, compile_step, print).compiled is None


@pytest.mark.parametrize("missing", [True, pytest.param(False, marks=plugin)])
def test_moments_on_a_host_that_is_not_here_are_refused(starter, monkeypatch, missing):
    if missing:
        monkeypatch.setattr(gpu_target, "has_compiler", lambda: False)
    with pytest.raises(LlmtuneConfigError, match=r"^optimizer\.memory: host can be planned for TPUs alone"):
        laid_out(starter, "h100:8", optimizer={"memory": "host"})


@pytest.mark.parametrize("name", GPUS)
def test_a_target_says_what_its_file_says(name):
    chip = chips()[name]
    said_whole = target_config(chip, chip.target)
    said = dict(re.findall(r"(\w+): (\S+)", said_whole))
    assert int(said["device_memory_size"]) == chip.hbm_bytes and int(said["active_links"]) == chip.links
    assert int(said["core_count"]) == chip.target["cores"]
    assert re.search(rf"major: {chip.target['capability']} feature_extension: (ACCELERATED_FEATURES|NONE) ", said_whole)


def test_what_the_plugin_refuses_is_one_line(monkeypatch):
    def refuse(**told):
        raise RuntimeError(f"no such target: {told['topology']}\nand much more")

    monkeypatch.setattr(gpu_target, "has_compiler", lambda: True)
    monkeypatch.setattr(gpu_target.topologies, "get_topology_desc", refuse)
    with pytest.raises(LlmtuneConfigError, match=r"^--topology: .* does not take 2x8 h100: no such target: 1x2x8$"):
        gpus(chips()["h100"], 2, 8)


@plugin
@pytest.mark.parametrize("name", GPUS)
def test_the_plugin_knows_the_same_chips(name):
    found = devices(parse_topology(f"{name}:2x4"))
    assert {device.device_kind for device in found} == {chips()[name].kind}
    assert [device.process_index for device in found] == [0] * 4 + [1] * 4


@plugin
def test_a_step_compiles_for_gpus_that_are_not_here(starter):
    """Memory, gathers and scattered gradients along fsdp, and cuDNN's attention by name."""
    data = {"train": "nowhere.jsonl", "sequence_length": 128, "packing": False}
    layout = laid_out(starter, "h100:8", data=data, train={"batch_size": 8, "dtype": "bfloat16"})
    compiled = compile_step(layout)
    assert compiled.needed >= compiled.arguments > 0 and compiled.alive <= compiled.needed
    assert compiled.kernels == ("dot_product_attention_bwd", "dot_product_attention_fwd")
    assert {(own.kind, own.axes) for own in compiled.collectives} >= {
        ("all-gather", "fsdp"),
        ("reduce-scatter", "fsdp"),
    }
