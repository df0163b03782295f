"""Search, the nearest change that fits, the cache and the page."""

import dataclasses
import json
import re

import pytest

from llmtune import pretrained
from llmtune.cli import main
from llmtune.config.file import build_run, load_run
from llmtune.errors import LlmtuneConfigError
from llmtune.planning import gpu_target
from llmtune.planning.ahead import Compiled, assign_step
from llmtune.planning.cache import cached, digest
from llmtune.planning.candidates import meshes
from llmtune.planning.collectives import Collective
from llmtune.planning.layout import lay_out
from llmtune.planning.mend import kinds_of_change, mend
from llmtune.planning.plan import Plan, plan_run
from llmtune.planning.record import record
from llmtune.planning.report import page
from llmtune.planning.search import different, search, write_layout
from llmtune.planning.topology import devices, parse_topology

pytest.importorskip("libtpu")


def run_of(model, rows=8, length=128, **sections):
    tree = {"model": str(model), "output": "nowhere", "objective": "pretrain"}
    data = {"train": "nowhere.jsonl", "sequence_length": length}
    return build_run({**tree, "data": data, "train": {"batch_size": rows}, **sections}, "test")


def laid_out(model, topology, **own):
    run, target = run_of(model, **own), parse_topology(topology)
    return lay_out(run, pretrained.open_source(run.model), target, devices(target))


def test_meshes_are_all_that_multiply_to_the_devices():
    assert list(meshes(8, ("fsdp", "tensor"), 1)) == [
        {"fsdp": 1, "tensor": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8, "tensor": 1}
    ]  # fmt: skip
    assert list(meshes(8, ("replica", "fsdp"), 2)) == [{"replica": 2, "fsdp": 4}]
    assert (
        list(meshes(8, ("fsdp",), 2)) == []
    )  # slices are joined by the slow network: weights are not gathered over it


def test_search_ends_with_a_configuration_that_train_reads(starter, tmp_path):
    said = []
    best = search(run_of(starter), parse_topology("v5e:2x2"), ["fsdp"], assign_step, said.append, count=1)[0]
    assert best.fits and "layouts of 1 strategies" in said[0]
    write_layout(best, tmp_path / "planned.yaml")
    run = load_run(tmp_path / "planned.yaml")
    assert run == best.layout.run and run.sharding.mesh == {"fsdp": 4}


@pytest.mark.nightly
def test_search_finds_a_layout_of_70b_that_is_no_slower_than_those_by_hand():
    run, topology = run_of("llama3.1-70b", rows=64, length=8192), parse_topology("v5p-128")
    found = search(run, topology, [], assign_step, lambda line: None)
    by_hand = plan_run(run, topology, ["fsdp", "fsdp_tensor", "sequence", "context"], assign_step, lambda line: None)
    best = min(plan.times.overlapped for plan in by_hand if plan.fits)
    assert found[0].fits and found[0].times.overlapped <= best
    assert found[0].needed == pytest.approx(found[0].layout.memory.total, rel=0.1)


def test_search_says_what_comes_nearest_where_nothing_fits(starter):
    with pytest.raises(
        LlmtuneConfigError, match=r"nothing fits v5e:2x2; fsdp .* comes nearest, \d+\.\d GB of 16\.9 GB"
    ):
        search(run_of("llama3.1-70b"), parse_topology("v5e:2x2"), ["fsdp"], assign_step, lambda line: None)


def test_a_window_passes_keys_no_further_than_it_reaches():
    """Of eight devices with 4,096 tokens each: from one on the left under a window of 4,096, else from seven."""
    passed = []
    for model in ("mistral-7b-v0.1", "mistral-7b-v0.2"):
        sharding = {"strategy": "context", "mesh": {"context": 8}}
        traffic = laid_out(model, "h100:8", rows=2, length=32768, sharding=sharding).traffic
        passed.append(sum(own.wire for own in traffic if own.kind == "collective-permute"))
    assert passed[0] * 7 == passed[1] > 0


def test_strategies_that_come_to_the_same_on_a_mesh_are_one(starter):
    """Over the rows alone `tensor` is `ddp`."""
    own = [
        laid_out(starter, "h100:8", sharding={"strategy": name, "mesh": {"data": 8}})
        for name in ("ddp", "tensor", "zero1")
    ]
    assert [layout.strategy.name for layout in different(own)] == ["ddp", "zero1"]


def test_search_says_where_the_compiler_finds_room_for_none(starter):
    def compile_layout(layout):
        return Compiled(1, 10**15, None, (), (), 0.0)

    with pytest.raises(LlmtuneConfigError, match=r"layouts fit v5e:2x2 by estimate, and none by the compiler"):
        search(run_of(starter), parse_topology("v5e:2x2"), ["fsdp"], compile_layout, lambda line: None)


def changes(layout):
    return [change for kind in kinds_of_change(layout) for change in kind]


def test_changes_come_in_the_order_of_what_they_cost():
    layout = laid_out("llama3.2-3b", "v5e:2x2", rows=16, length=2048, train={"batch_size": 16, "remat": "none"})
    names = [name for name, _ in changes(layout)]
    assert names[0] == "train.microbatches 2"
    assert names.index("train.remat block") < next(n for n, name in enumerate(names) if "strategy" in name)
    assert names[-1].startswith("--topology v5e:")


def test_the_hosts_memory_is_tried_before_another_layout():
    layout = laid_out("mistral-7b-v0.1", "v5e:2x2", rows=4, length=2048, train={"batch_size": 4, "remat": "block"})
    names = [name for name, _ in changes(layout)]
    host = names.index("optimizer.memory host")
    assert names.index("train.remat offload") < host < next(n for n, name in enumerate(names) if "strategy" in name)
    own = dict(changes(layout))["optimizer.memory host, train.remat offload"]
    weights = layout.memory.weights
    assert layout.memory.host == 0 and own.memory.moments < 1e3
    assert own.memory.host == pytest.approx(2 * weights + 1 * 2048 * 4096 * 2 * 32, rel=0.01)


def test_described_gpus_have_no_memory_of_their_host():
    layout = laid_out("llama3.2-1b", "h100:1", rows=4, length=2048, train={"batch_size": 4, "remat": "block"})
    assert not any("host" in name or "offload" in name for name, _ in changes(layout))


def test_the_nearest_change_that_fits_is_compiled():
    adapt = {"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"}
    layout = laid_out("llama3.2-1b", "v5e:2x2", length=2048, adapt=adapt, train={"batch_size": 256, "remat": "none"})
    assert layout.memory.total > layout.topology.chip.hbm_bytes
    mended = mend(Plan(layout, None), assign_step, lambda line: None)
    assert mended is not None and mended.plan.fits and mended.plan.compiled.needed < layout.memory.total
    assert mended.change.startswith("train.")


def compiled():
    return Compiled(7, 10, None, (Collective("all-gather", "fsdp", 4, 2, 80, 60),), ("splash",), 1.5)


def test_a_layout_is_compiled_once(starter, tmp_path):
    asked = []

    def ask(layout):
        asked.append(layout)
        return compiled()

    layout = laid_out(starter, "v5e:2x2")
    once = cached(ask, tmp_path)
    assert once(layout) == compiled() == once(layout) and len(asked) == 1
    other = layout.again(microbatches=2)
    assert digest(layout, "ask") != digest(other, "ask") != digest(other, "else")
    moved = dataclasses.replace(layout, run=dataclasses.replace(layout.run, output="elsewhere"))
    assert digest(moved, "ask") == digest(layout, "ask")
    next(tmp_path.glob("*.json")).write_text('{"cut')
    assert once(layout) == compiled() and len(asked) == 2


def test_the_page_needs_no_network_and_the_record_adds_up(starter):
    layout = laid_out(starter, "v5e:2x2")
    plans = [
        Plan(layout, None),
        Plan(layout, dataclasses.replace(compiled(), needed=layout.topology.chip.hbm_bytes * 2)),
    ]
    html = page(plans)
    assert not re.search(r'(src|href)="|url\(|@import|<script', html)
    assert "does not fit" in html and "by estimate alone" in html and "prefers-color-scheme: dark" in html
    own = record(plans[1])
    parts = {name: size for name, size in own["memory"].items() if name not in ("needed", "limit", "estimated")}
    assert sum(parts.values()) == own["memory"]["needed"] and not own["fits"]
    assert json.loads(json.dumps(own))["collectives"][0]["axes"] == "fsdp"


def test_gpus_are_estimated_without_their_compiler_and_that_is_said(starter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_target, "has_compiler", lambda: False)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {starter}\noutput: nowhere\nobjective: pretrain\ndata: {{train: x.jsonl, sequence_length: 128}}\n"
        "train: {batch_size: 16}\n"
    )
    target = tmp_path / "plan.json"
    assert main(["plan", str(path), "--topology", "h100:2x8", "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "by estimate alone: no compiler for this chip is installed" in out
    own = json.loads(target.read_text())[0]
    assert own["compiled"] is None and own["devices"] == 16 and own["seconds"]["dcn"] > 0 == own["seconds"]["ici"]
