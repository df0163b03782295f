"""`llmtune plan` on small models: what it prints, what it refuses before it compiles, what it never opens."""

from pathlib import Path

import pytest

from llmtune.cli import main
from llmtune.config.file import build_run
from llmtune.planning.ahead import assign_step, compile_step
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


@pytest.fixture(scope="module")
def planned(request):
    said = []
    run = small_run(Path(__file__).parents[2] / "llmtune" / "starter")
    return plan_run(run, parse_topology("v5e:2x2"), [], compile_step, said.append)[0], said


def test_a_small_run_is_compiled_and_priced(planned):
    plan, said = planned
    assert plan.fits and plan.layout.strategy.name == "fsdp" and plan.layout.sizes["fsdp"] == 4
    assert any("compiling fsdp (fsdp 4) for v5e:2x2" in line for line in said)
    memory = plan.memory
    assert 0 < memory["optimizer state"] - 2 * memory["weights"] < 64  # two moments of each weight, and counters
    assert sum(memory.values()) == plan.needed >= plan.compiled.alive * 0.5
    assert all(own.axes == "fsdp" and own.ways == 4 for own in plan.exchanged) and plan.exchanged
    costs, times = plan.layout.costs, plan.times
    assert 0 < costs.model_flops < costs.computed_flops
    assert times.dcn == 0 < times.overlapped <= times.apart and 0 < times.mfu < 1


def test_without_machine_code_the_figures_are_the_same(planned):
    plan, _ = planned
    quick = assign_step(plan.layout)
    assert (quick.needed, quick.arguments) == (plan.compiled.needed, plan.compiled.arguments)
    assert quick.collectives == plan.compiled.collectives and quick.alive is None


def test_model_flops_are_those_of_the_training_metrics(planned):
    plan, _ = planned
    layout, rows, length = planned[0].layout, 8, 128
    work = layout.program.work
    pairs = rows * length * (length + 1) / 2 * layout.source.config.num_hidden_layers
    expected = work.per_token * rows * length + work.per_pair * pairs
    assert plan.layout.costs.model_flops == pytest.approx(expected, rel=1e-6)


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
        (
            ["--topology", "v5e:2x2", "--strategies", "expert"],
            "",
            "spreads experts over 2 devices, and",
        ),
        (
            ["--topology", "v6e:8x8"],
            "train: {batch_size: 64}\nsharding: {strategy: fsdp_tensor, mesh: {fsdp: 32, tensor: 2}}",
            "cannot be laid onto the torus of v6e:8x8, 8 x 8; name sizes",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_compiles(tmp_path, starter, capsys, monkeypatch, arguments, more, said):
    monkeypatch.setattr("llmtune.planning.ahead.compile_step", lambda *_: pytest.fail("it compiles"))
    assert main(["plan", write(tmp_path, starter, more), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_all_strategies_are_laid_out_before_the_first_compiles(starter):
    with pytest.raises(ShardingError, match="no strategy 'nothing'"):
        plan_run(
            small_run(starter),
            parse_topology("v5e:2x2"),
            ["fsdp", "nothing"],
            lambda _: pytest.fail("it compiles"),
            lambda line: None,
        )
