"""Two processes of four devices are one of eight: curve, rows, what is read of the weights, checkpoints, exports."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import llmtune
from tests.multihost.together import together
from tests.parity.reference import save_model
from tests.parity.test_gradients import SIZES
from tests.runs import read_curve, run_config, write_rows
from tests.sharding.test_grid import MESHES

STEPS, ROWS = 4, 8
LORA = {"rank": 4, "alpha": 8}
ACROSS = {"context": 8}  # the processes divide the sequence, so that both hold every row


class Ground:
    """A folder with rows of real text, and runs of a real model on them."""

    def __init__(self, path, stories, batches):
        self.path, self.model = path, stories
        self.rows = write_rows(path / "rows.jsonl", *batches)

    def config(self, name, strategy, mesh, adapt, quantize=None):
        data = {"train": str(self.rows), "format": "tokens", "sequence_length": 64, "packing": False, "shuffle": False}
        run_config(
            self.path, self.model, self.rows, name, data=data, adapt=adapt, quantize=quantize,
            train={"steps": STEPS, "batch_size": ROWS, "dtype": "float32"}, evaluate={"every": None},
            sharding={"strategy": strategy, "mesh": mesh}, checkpoint={"every": 2, "keep": 2},
        )  # fmt: skip
        return self.path / f"{name}.yaml"

    def one(self, name, strategy, mesh, adapt, quantize=None, devices=8):
        """The directory of the run by one process of so many devices."""
        run = llmtune.load_run(self.config(name, strategy, mesh, adapt, quantize))
        llmtune.train(run, devices=jax.devices()[:devices])
        return Path(run.output)


NF4 = {"base": "nf4"}
RUNS = {"whole": ("fsdp", {"fsdp": 8}, None), "across": ("context", ACROSS, LORA, NF4)}


@pytest.fixture(scope="module")
def ground(tmp_path_factory, stories, batches):
    return Ground(tmp_path_factory.mktemp("multihost"), stories, batches)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, batches):
    """The same rows for a small Mixtral of 8 experts."""
    path = tmp_path_factory.mktemp("mixture")
    return Ground(path, save_model("mixtral", path / "model", **{**SIZES, "vocab_size": 512}), batches)


@pytest.fixture(scope="module")
def two(ground):
    """What two processes read of each run of RUNS, which they train here."""
    configs = [ground.config(name, *own) for name, own in RUNS.items()]
    told = together(ground.path, configs, processes=2, devices=4)
    return {name: [process[number] for process in told] for number, name in enumerate(RUNS)}


def assert_same_curve(one, other):
    for ours, theirs in zip(read_curve(one), read_curve(other), strict=True):
        assert len(ours) == STEPS
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def digests(directory):
    """Of all weights and of all that is not about the session in an export."""
    files = sorted(path for path in (directory / "export").rglob("*") if path.suffix == ".safetensors")
    assert files
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_processes_follow_the_curve_of_one(ground, two):
    assert_same_curve(ground.path / "whole", ground.one("whole-one", *RUNS["whole"]))


def test_two_processes_that_divide_the_sequence_follow_the_curve_of_one_device(ground, two):
    assert_same_curve(ground.path / "across", ground.one("across-one", "fsdp", {"fsdp": 1}, LORA, NF4, devices=1))


def test_what_a_quantised_run_of_two_processes_was_merged_into_is_told(ground, two):
    told = json.loads((ground.path / "across" / "export" / "model" / "merge.json").read_text())
    assert told["logits"]["tokens"] > 0 and told["logits"]["kl"] < 1e-4


def test_each_process_reads_its_share_of_the_rows(ground, two, batches):
    """Disjoint and complete, and the rows that the file has there."""
    first, second = ({step: (share, rows) for step, share, rows in own["rows"]} for own in two["whole"])
    assert set(first) == set(second) == set(range(STEPS))
    text = batches[0].reshape(-1, ROWS, 64)
    for step in range(STEPS):
        assert sorted(first[step][0] + second[step][0]) == list(range(ROWS))
        for share, rows in (first[step], second[step]):
            np.testing.assert_array_equal(rows, text[step][share])


def test_each_process_tokenises_its_share_of_the_file(ground, two):
    """Here too each row is read by one process; whose rows of a batch they are is another matter."""
    first, second = (own["file_rows"] for own in two["whole"])
    assert first + second == [f"{ground.rows}:{line}" for line in range(1, len(first + second) + 1)]
    assert 0.4 < len(first) / len(first + second) < 0.6


def test_processes_that_divide_the_sequence_read_the_same_rows(two):
    for own in two["across"]:
        assert all(share == list(range(ROWS)) for _, share, _ in own["rows"])


def test_each_process_reads_its_share_of_the_weights(ground, two, stories):
    total = sum(path.stat().st_size for path in stories.glob("*.safetensors"))
    for own in two["whole"]:
        assert 0.45 * total < own["weight_bytes"] < 0.55 * total


def test_one_process_reads_the_checkpoint_of_two_and_exports_the_same_bytes(ground, two):
    directory = ground.path / "whole"
    before = digests(directory)
    shutil.rmtree(directory / "export")
    llmtune.train(llmtune.load_run(directory.with_suffix(".yaml")), devices=jax.devices()[:8])
    assert digests(directory) == before and len(read_curve(directory)[0]) == STEPS


@pytest.mark.nightly
@pytest.mark.parametrize("adapt", [None, LORA], ids=["full", "lora"])
def test_the_checkpoint_of_two_is_gone_on_from_by_four_and_by_one(ground, adapt):
    name = f"elastic-{'full' if adapt is None else 'lora'}"
    config, directory = ground.config(name, "fsdp", {"fsdp": 8}, adapt), ground.path / name
    together(ground.path, [config], processes=2, devices=4)
    whole, curve = digests(directory), read_curve(directory)
    for again in ("four", "one"):
        shutil.rmtree(directory / "export")
        shutil.rmtree(directory / "checkpoints" / str(STEPS))
        if again == "four":
            together(ground.path, [config], processes=4, devices=2)
        else:
            llmtune.train(llmtune.load_run(config), devices=jax.devices()[:8])
        for ours, theirs in zip(read_curve(directory), curve, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert digests(directory).keys() == whole.keys()


@pytest.mark.nightly
@pytest.mark.parametrize("adapt", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", list(MESHES))
def test_every_strategy_over_two_processes(ground, mixture, strategy, adapt):
    """Those that spread experts, of a mixture."""
    ground = mixture if "expert" in strategy else ground
    name = f"{strategy}-{'full' if adapt is None else 'lora'}"
    together(ground.path, [ground.config(name, strategy, MESHES[strategy], adapt)], processes=2, devices=4)
    one = ground.one(f"{name}-one", strategy, MESHES[strategy], adapt)
    assert_same_curve(ground.path / name, one)


@pytest.mark.parametrize("adapt", [None, pytest.param(LORA, marks=pytest.mark.nightly)], ids=["full", "lora"])
def test_experts_that_processes_divide(mixture, adapt):
    """Four experts in each; the export, whose tensors are an expert each, is that of one process."""
    name, strategy = f"divided-{'full' if adapt is None else 'lora'}", ("expert", {"expert": 8})
    together(mixture.path, [mixture.config(name, *strategy, adapt)], processes=2, devices=4)
    one = mixture.one(f"{name}-one", *strategy, adapt)
    assert_same_curve(mixture.path / name, one)
    ours, theirs = (load_file(run / "export/model/model.safetensors") for run in (mixture.path / name, one))
    assert ours.keys() == theirs.keys() and any("experts.7" in tensor for tensor in ours)
    for tensor, own in ours.items():
        np.testing.assert_allclose(own, theirs[tensor], atol=1e-5, err_msg=tensor)


@pytest.mark.nightly
def test_a_tensor_axis_across_processes(ground):
    """Heads are divided between the processes, which hold the same rows."""
    config = ground.config("heads", "tensor", {"tensor": 4}, LORA)
    told = together(ground.path, [config], processes=2, devices=2)
    assert all(share == list(range(ROWS)) for own in told for _, share, _ in own[0]["rows"])
    assert_same_curve(ground.path / "heads", ground.one("heads-one", "tensor", {"tensor": 4}, LORA, devices=4))
