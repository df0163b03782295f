"""Eight simulated devices: the same losses as one, under every strategy, and checkpoints that move between meshes."""

import jax
import numpy as np
import pytest

import llmtune
from tests.runs import ADAPT, curve, read_curve, run_config, write_rows
from tests.training.interruption import StoppingDisplay, train_until

STRATEGIES = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp_tensor": {"strategy": "fsdp_tensor", "mesh": {"fsdp": 2, "tensor": 4}},
}


@pytest.fixture(scope="module")
def data(batches, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *batches)


@pytest.fixture(scope="module")
def single(stories, data, tmp_path_factory):
    """The curves of one device, by kind of adaptation."""
    directory = tmp_path_factory.mktemp("single")
    return {
        kind: curve(run_config(directory, stories, data, name=kind, adapt=adapt, train=train_section()))
        for kind, adapt in ADAPT.items()
    }


def train_section(**options):
    return {"steps": 20, "batch_size": 4, "dtype": "float32", **options}


PAIRS = [("fsdp", "full"), ("fsdp_tensor", "lora"), *(
    pytest.param(*pair, marks=pytest.mark.nightly) for pair in (("fsdp", "lora"), ("fsdp_tensor", "full"))
)]  # fmt: skip


@pytest.mark.parametrize(("strategy", "adapt"), PAIRS)
def test_eight_devices_train_like_one(stories, data, single, tmp_path, strategy, adapt):
    run = run_config(tmp_path, stories, data, adapt=ADAPT[adapt], sharding=STRATEGIES[strategy], train=train_section())
    losses, norms = curve(run, devices=8)  # under fsdp, four rows on eight devices: half of them get empty rows
    np.testing.assert_allclose(losses, single[adapt][0], rtol=1e-5)
    np.testing.assert_allclose(norms, single[adapt][1], rtol=1e-4)


def test_microbatches_on_eight_devices(stories, data, single, tmp_path):
    run = run_config(tmp_path, stories, data, sharding=STRATEGIES["fsdp_tensor"], train=train_section(microbatches=2))
    np.testing.assert_allclose(curve(run, devices=8)[0], single["full"][0], rtol=1e-5)


@pytest.mark.parametrize(
    ("sharding", "adapt", "said"),
    [({"strategy": "expert", "mesh": {"expert": 4, "fsdp": 2}}, None, "expert spreads experts over 4 devices, and .* has none"),
     ({"strategy": "context", "mesh": {"context": 8}}, {"method": "prompt_tuning", "virtual_tokens": 4}, "cannot do yet"),
     ({"strategy": "context", "mesh": {"context": 3}}, None, "does not multiply to the 8 devices")],
)  # fmt: skip
def test_what_a_strategy_has_nothing_to_do_for_is_refused(stories, data, tmp_path, sharding, adapt, said):
    run = run_config(tmp_path, stories, data, adapt=adapt, sharding=sharding, train=train_section())
    with pytest.raises((ValueError, llmtune.LlmtuneError), match=said):
        llmtune.train(run)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_moves_between_meshes(stories, data, single, tmp_path):
    """fsdp on eight devices, then tensor on eight, then one device: one curve, that of a run which never moved."""

    def run(sharding):
        return run_config(
            tmp_path,
            stories,
            data,
            adapt=ADAPT["lora"],
            train=train_section(),
            checkpoint={"every": 6},
            sharding=sharding,
        )

    train_until(run(STRATEGIES["fsdp"]), step=7, devices=8)
    train_until(run(STRATEGIES["fsdp_tensor"]), step=14, devices=8)
    said = StoppingDisplay()
    llmtune.train(run(None), said, devices=jax.devices()[:1])
    assert "resuming after step 12" in said.text
    np.testing.assert_allclose(read_curve(tmp_path / "run")[0], single["lora"][0], rtol=1e-5)
