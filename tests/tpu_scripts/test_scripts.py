"""What the pod scripts would run, word for word; what they refuse; and the worker's loop, carried out.

golden/*.txt are the dry runs. After a change on purpose: `python -m tests.tpu_scripts.test_scripts` writes them again.
"""

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.runs import run_config

SCRIPTS, GOLDEN = ROOT / "tpu_scripts", Path(__file__).parent / "golden"
PLACE = ["--zone", "us-west4-a", "--project", "mine"]
CONFIG = "configs/recipes/llama3.1_8b_v5e.yaml"
SHARE = ["--share", "10.0.0.2:/share"]
DRY_RUNS = {
    "create_on_demand": ["create.sh", "pod", "--type", "v5litepod-16", *PLACE],
    "create_spot": ["create.sh", "pod", "--type", "v6e-64", "--spot"],
    "create_queued": ["create.sh", "pod", "--type", "v5p-128", "--queued", "--reserved", "--valid-for", "6h", *PLACE],
    "create_slices": ["create.sh", "pod", "--type", "v5litepod-256", "--spot", "--slices", "2", *PLACE],
    "create_version": ["create.sh", "pod", "--type", "v9-8", "--version", "v2-alpha-tpuv9"],
    "install": ["install.sh", "pod", *SHARE, *PLACE],
    "install_slices": ["install.sh", "pod", *SHARE, "--slices", "2", *PLACE],
    "launch": ["launch.sh", "pod", *PLACE, "--", CONFIG],
    "launch_overrides": ["launch.sh", "pod", "--slices", "2", "--", CONFIG, "--data.train", "my rows.jsonl"],
    "logs": ["logs.sh", "pod", *PLACE],
    "logs_slice": ["logs.sh", "pod", "--slices", "2", "--slice", "1", "--worker", "3"],
    "stop": ["stop.sh", "pod", *PLACE],
    "resume": ["resume.sh", "pod", "--type", "v5litepod-16", "--spot", *SHARE, *PLACE, "--", CONFIG],
    "resume_slices": ["resume.sh", "pod", "--type", "v6e-64", "--spot", "--slices", "2", *SHARE, "--", CONFIG],
    "fetch": ["fetch.sh", "pod", "runs/llama", "here/llama", *PLACE],
    "fetch_checkpoints": ["fetch.sh", "pod", "--checkpoints", "runs/my llama", "here", "--slices", "2"],
    "delete": ["delete.sh", "pod", *PLACE],
    "delete_queued": ["delete.sh", "pod", "--queued"],
}
MISTAKES = [
    (["create.sh", "--type", "v6e-8"], "no NAME was given; --help shows what comes where"),
    (["create.sh", "pod"], "no --type was given, such as v5litepod-16"),
    (["create.sh", "pod", "--type"], "--type needs a value; --help says which"),
    (["create.sh", "pod", "--type", "--spot"], "--type needs a value; --help says which"),
    (["create.sh", "pod", "--type", "v5e-16"], "--type v5e-16: the cloud says v5litepod-16"),
    (["create.sh", "pod", "--type", "h100"], "--type h100: its image is not known here; name it with --version"),
    (["create.sh", "pod", "--type", "v6e-8", "--slices", "0"], "--slices 0: give how many, 1 or more"),
    (["create.sh", "pod", "--type", "v6e-8", "--spot", "--reserved"], "--reserved and --spot do not go together; keep one"),
    (["create.sh", "pod", "--type", "v6e-8", "--valid-for", "6h"], "--valid-for is about the queue; add --queued"),
    (["create.sh", "Pod", "--type", "v6e-8"], "NAME Pod: small letters, digits and - only, a letter first"),
    (["create.sh", "pod", "second"], "second: there is a NAME already, pod; --help shows the order"),
    (["create.sh", "pod", "--spott"], "unknown option --spott; --help lists them"),
    (["install.sh", "pod"], "no --share was given: the workers write one run directory, on a disk that they share"),
    (["install.sh", "pod", "--share", "share"], "--share share: give HOST:/PATH, such as 10.0.0.2:/share"),
    (["launch.sh", "pod"], "no CONFIG.yaml was given; it comes after --"),
    (["launch.sh", "pod", "--", "none.yaml"], "none.yaml: there is no such file here"),
    (["logs.sh", "pod", "--slice", "1"], "--slice 1: there are 1, counted from 0"),
    (["resume.sh", "pod", "--type", "v6e-8", "--", CONFIG], "no --share was given, which install.sh needs"),
    (["resume.sh", "pod", "--type", "--spot", *SHARE, "--", CONFIG], "--type needs a value; --help says which"),
    (["fetch.sh", "pod", "runs/llama"], "give NAME, RUN and DESTINATION, in this order; --help says what they are"),
]  # fmt: skip
TOP = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")


def run(words, **environment):
    command = [str(SCRIPTS / words[0]), *words[1:]]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def dry_run(words):
    """What is printed, with the checkout's own place taken out."""
    done = run([words[0], "--dry-run", *words[1:]])
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "CHECKOUT")


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_these_commands(name):
    assert dry_run(DRY_RUNS[name]) == (GOLDEN / f"{name}.txt").read_text()


def test_there_is_no_golden_file_besides():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(DRY_RUNS)


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_code_2(words, line):
    done = run([*words[:1], "--dry-run", *words[1:]])
    assert (done.returncode, done.stderr, done.stdout) == (2, f"{words[0]}: error: {line}\n", "")


@pytest.mark.parametrize("script", TOP)
def test_help_is_the_head_of_the_script(script):
    said = run([script, "--help"])
    assert said.returncode == 0 and script in said.stdout and "--dry-run" in said.stdout
    assert not [line for line in said.stdout.splitlines() if line.startswith(("#", "set ", "source "))]


@pytest.mark.parametrize("script", TOP)
def test_every_script_has_a_dry_run(script):
    assert script in {words[0] for words in DRY_RUNS.values()}


def test_shellcheck_finds_nothing():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker is not None, "pip install '.[test]' brings shellcheck"
    scripts = [*SCRIPTS.rglob("*.sh"), *SCRIPTS.rglob("*.sbatch")]
    done = subprocess.run([checker, "-x", "-P", str(SCRIPTS), *map(str, scripts)], capture_output=True, text=True)
    assert len(scripts) >= 13 and (done.returncode, done.stdout) == (0, "")


def test_the_jobset_fills_its_slice():
    """As many processes as the topology has hosts, and the codes that starting again cannot mend end it."""
    spec = yaml.safe_load((SCRIPTS / "gke" / "jobset.yaml").read_text())["spec"]
    (slice_,) = spec["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 76]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def at_work(home, **environment):
    """Where worker/train.sh finds the llmtune of this environment; its home is the test's folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LLMTUNE_PAUSE": "0"}
    return {**os.environ, **own, **environment}


def worker(tmp_path, *words, **environment):
    """(what worker/train.sh says, the code that it leaves behind)."""
    said = run(["worker/train.sh", *map(str, words)], **at_work(tmp_path, **environment))
    ended = tmp_path / "llmtune.exit"
    return said, ended.read_text().strip() if ended.exists() else None


def test_a_worker_does_not_start_again_after_a_mistake(tmp_path):
    said, ended = worker(tmp_path, tmp_path / "none.yaml", LLMTUNE_PROCESSES="1")
    assert (said.returncode, ended) == (2, "2") and "start 2" not in said.stdout


@pytest.mark.nightly
def test_a_worker_passes_a_signal_on_and_goes_on_when_asked_again(tmp_path, starter):
    rows = starter / "instructions_train.jsonl"
    sections = {"data": {"train": str(rows), "sequence_length": 64}, "evaluate": {"every": None}}
    config = tmp_path / "run.yaml"
    run_config(tmp_path, starter, rows, train={"steps": 60, "batch_size": 2}, adapt={"rank": 2}, **sections)
    environment = at_work(tmp_path, LLMTUNE_PROCESSES="1")
    with subprocess.Popen([SCRIPTS / "worker" / "train.sh", config], cwd=ROOT, env=environment) as process:
        until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or process.poll() is not None)
        process.terminate()
        assert process.wait(120) == 143
    assert not (tmp_path / "llmtune.exit").exists() and any((tmp_path / "run" / "checkpoints").iterdir())
    said, ended = worker(tmp_path, config, LLMTUNE_PROCESSES="1")
    assert (said.returncode, ended) == (0, "0") and "resuming after step" in said.stdout


def until(done):
    deadline = time.monotonic() + 240
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, words in DRY_RUNS.items():
        (GOLDEN / f"{name}.txt").write_text(dry_run(words))
