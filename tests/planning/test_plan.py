"""`llmtune plan` on small models: what it prints, what it refuses before it compiles, what it never opens."""

import pytest

from llmtune.cli import main
from llmtune.config.file import build_run
from llmtune.errors import LlmtuneConfigError
from llmtune.planning.plan import plan_run
from llmtune.planning.topology import parse_topology
from llmtune.sharding import ShardingError

pytest.importorskip("libtpu")


def small_run(starter, **sections):
    tree = {
        "model": str(starter),
        "output": "nowhere",
        "objective": "pretrain",
        "data": {"train": "there/is/no/such/file.jsonl", "sequence_length": 128},
        "train": {"batch_size": 8},
    }
    return build_run({**tree, **sections}, "test")


def test_a_small_run_is_compiled_and_priced(starter):
    said = []
    plan = plan_run(small_run(starter), parse_topology("v5e:2x2"), [], said.append)[0]
    assert plan.fits and plan.strategy == "fsdp" and plan.devices == 4
    assert any("compiling fsdp (fsdp 4) for v5e:2x2" in line for line in said)
    assert 0 < plan.state.moments - 2 * plan.state.weights < 64  # two moments of each weight, and counters
    assert plan.compiled.arguments > plan.state.total and plan.compiled.peak >= plan.compiled.arguments
    assert {c.kind for c in plan.compiled.collectives} >= {"all-gather"}
    assert all(c.axes == "fsdp" and c.ways == 4 for c in plan.compiled.collectives)
    assert 0 < plan.costs.model_flops < plan.costs.computed_flops
    assert plan.roofline.dcn == 0 < plan.roofline.overlapped <= plan.roofline.apart and 0 < plan.roofline.mfu < 1


def write(tmp_path, starter, more=""):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {starter}\noutput: nowhere\nobjective: pretrain\ndata: {{train: nowhere.jsonl, sequence_length: 128}}\n"
        f"{more or 'train: {batch_size: 8}'}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "more", "said"),
    [
        (["--topology", "v9:4"], "", "--topology: 'v9:4' is not known; chips: v4, v5e"),
        (["--topology", "v5e:2x2", "--strategies", "fdsp"], "", "no strategy 'fdsp'; known:"),
        (["--topology", "v5e:2x2"], "train: {batch_size: 6}", "6 rows do not divide over the 4 parts"),
        (
            ["--topology", "v5e:2x2"],
            "sharding: {strategy: fsdp, mesh: {fsdp: 3}}",
            "does not multiply to the 4 devices",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_compiles(tmp_path, starter, capsys, monkeypatch, arguments, more, said):
    monkeypatch.setattr("llmtune.planning.plan.compile_step", lambda *_: pytest.fail("it compiles"))
    assert main(["plan", write(tmp_path, starter, more), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_all_strategies_are_laid_out_before_the_first_compiles(starter, monkeypatch):
    monkeypatch.setattr("llmtune.planning.plan.compile_step", lambda *_: pytest.fail("it compiles"))
    with pytest.raises((ShardingError, LlmtuneConfigError)):
        plan_run(small_run(starter), parse_topology("v5e:2x2"), ["fsdp", "nothing"], lambda line: None)
