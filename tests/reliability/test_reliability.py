"""The rows of docs/reliability.md in their small size."""

import signal

import jax
import pytest
from jax.sharding import AxisType

from tests.reliability import configurations, corruption, disk, hangs, kills, order, several
from tests.reliability.faults import COMMIT_POINTS
from tests.reliability.forge import Forge
from tests.reliability.tiny import Ground

PATIENCE = 100  # seconds: how soon is a figure of `make reliability`, where the machine is known


@pytest.fixture(scope="module")
def forge():
    with Forge() as forge:
        yield forge


@pytest.fixture
def ground(tmp_path):
    return Ground(tmp_path)


def mesh(fsdp, tensor):
    shape = (fsdp, tensor)
    return jax.make_mesh(shape, ("fsdp", "tensor"), (AxisType.Explicit,) * 2, devices=jax.devices()[: fsdp * tensor])


def check(row):
    assert row.ok, f"{row.id} {row.what}: {row.figure}"


def test_kills_at_random(forge, ground):
    check(kills.kill_at_random(forge, ground, kills=20, steps=20))


def test_kills_at_each_stroke_of_a_commit(forge, ground):
    by_night = ("after fsync, before the rename", "before an old step goes", "after an old step went")
    points = {name: fault for name, fault in COMMIT_POINTS.items() if name not in by_night}
    check(kills.kill_at_each_stroke(forge, ground, points))


def test_signals_that_ask(forge, ground):
    check(kills.ask_to_stop(forge, ground, 3, patience=PATIENCE))


@pytest.mark.nightly
def test_a_storm_is_given_up(ground):
    check(kills.storm(ground, 1))


def test_corruption(tmp_path):
    with jax.set_mesh(mesh(1, 1)) as own:
        del own
        check(corruption.corrupt(tmp_path, 96, mesh(1, 1)))
        check(corruption.all_bad(tmp_path, mesh(1, 1)))


def test_no_permission(forge, ground):
    by_day = {name: corruption.NO_RIGHT[name] for name in ("checkpoints", "step")}
    check(corruption.no_permission(forge, ground, by_day))


def test_meshes(tmp_path):
    check(corruption.across_meshes(tmp_path, [mesh(1, 1), mesh(2, 1), mesh(2, 4), mesh(1, 8), mesh(8, 1)]))


def test_a_full_disk(forge, ground):
    check(disk.full_while_saving(forge, ground, [3]))
    check(disk.full_while_exporting(forge, ground))


def test_a_lost_coordinator(forge, ground):
    check(several.lose_one(forge, ground, [(0, signal.SIGKILL)], steps=6, patience=PATIENCE))


@pytest.mark.nightly
def test_processes(forge, ground):
    check(several.fail_in_one(forge, ground))
    check(several.ask_one(forge, ground))
    check(several.elastic(forge, ground))


@pytest.mark.nightly
def test_a_supervised_run_of_two_processes(ground):
    check(several.supervised(ground))


def test_hangs(forge, ground):
    check(hangs.hang(forge, ground, places={"read": hangs.PLACES["read"]}, patience=PATIENCE))


def test_the_same_rows_and_the_same_curve(forge, ground):
    check(order.same_rows(50))
    check(order.same_curve(forge, ground, 12))


@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=pytest.mark.nightly)])
def test_configurations_that_nobody_would_write(tmp_path, count):
    check(configurations.read_all(tmp_path, count, patience=PATIENCE))


def test_a_trainer_whose_supervisor_is_gone_ends_as_when_asked_to(forge, ground):
    trainer = forge.train(ground.config("orphan", steps=10**6, every=10**6), environment={"LLMTUNE_SUPERVISOR": "1"})
    assert trainer.wait() == 143, trainer.said
