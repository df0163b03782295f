"""Card, notice and provenance of real exports; and a run whose environment is full of secrets, none of which is in any file."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import llmtune
from llmtune.errors import LlmtuneConfigError
from tests.conftest import ROOT
from tests.evaluation.runs import STARTER, short_run

AGREEMENT = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n...\n"
CANARIES = {
    "HF_TOKEN": "hf_CANARYcanaryCANARYcanaryCANARY01",
    "WANDB_API_KEY": "canary0123456789abcdefcanary0123456789ab",
    "AWS_SECRET_ACCESS_KEY": "Canary/aws+secret/0123456789",
    "MY_PASSWORD": "canary pass \"word'",
}


def llama(directory):
    """The starter model as if Meta had published it."""
    shutil.copytree(STARTER, directory, ignore=shutil.ignore_patterns("*.md", "*.jsonl"))
    (directory / "LICENSE").write_text(AGREEMENT)
    (directory / "USE_POLICY.md").write_text("a policy\n")
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of two sources over a Llama; its directory."""
    directory = tmp_path_factory.mktemp("papers")
    base = llama(directory / "base")
    short_run(directory)
    parts = [{"path": str(directory / "train.jsonl"), "license": "CC-BY-4.0"}, str(directory / "validation.jsonl")]
    overrides = [
        "--model",
        str(base),
        "--data.train",
        json.dumps(parts),
        "--train.steps",
        "3",
        "--evaluate.samples_every",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "llmtune.cli",
        "train",
        str(directory / "run.yaml"),
        *overrides,
        "--profile",
        "2:3",
    ]
    alone = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}  # beside torch, JAX's profiler crashes the process
    subprocess.run(command, env=alone, check=True, capture_output=True)
    return directory


def front(directory):
    text = (directory / "README.md").read_text()
    matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(matter[1]), text


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_export_of_a_llama_carries_what_its_licence_asks_for(exported, kind):
    export = exported / "run" / "export" / kind
    matter, text = front(export)
    assert (
        matter["license"] == "llama3.1" and matter["library_name"] == {"model": "transformers", "adapter": "peft"}[kind]
    )
    assert "# Llama run\n" in text and "**Built with Llama**" in text and "add a copy" not in text
    notice = (
        "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright \N{COPYRIGHT SIGN} Meta Platforms, Inc."
    )
    assert (export / "NOTICE").read_text().startswith(notice)
    assert (export / "LICENSE").read_text() == AGREEMENT and (export / "USE_POLICY.md").exists()


def test_provenance_says_where_everything_comes_from(exported):
    run = exported / "run"
    known = json.loads((run / "export/model/provenance.json").read_text())
    assert known["name"] == "Llama run" and known["kind"] == "model" and known["license"]["agreement"] == "LICENSE"
    assert known["base"]["sha256"] == (run / "base.sha256").read_text().strip()
    assert known["data"]["sha256"] == (run / "data.sha256").read_text().strip()
    first, second = known["data"]["train"]["sources"]
    assert first["sha256"] == hashlib.sha256((exported / "train.jsonl").read_bytes()).hexdigest()
    assert (first["license"], second["license"]) == ("CC-BY-4.0", None)
    assert known["configuration"]["train"]["steps"] == 3 and known["versions"]["llmtune"] == llmtune.__version__
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (
        known["metrics"]["after"]["loss"] == evaluation["after"]["loss"] and "samples" not in known["metrics"]["after"]
    )
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert known["commit"].rstrip("+") == head
    card = (run / "export/model/README.md").read_text()
    assert f"{evaluation['after']['loss']:.4f}" in card and "CC-BY-4.0" in card and "not stated" in card


def test_samples_and_a_trace_of_some_steps(exported):
    run = exported / "run"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2] and {"prompt", "completion"} <= rows[0].keys()
    assert list(run.glob("profile/**/*.xplane.pb"))


def test_a_quantised_export_carries_the_papers_and_says_what_was_done(exported, tmp_path):
    from llmtune.cli import main

    assert main(["export", str(exported / "run"), "--quantize", "int8", "--output", str(tmp_path / "int8")]) == 0
    known = json.loads((tmp_path / "int8/provenance.json").read_text())
    assert known["name"] == "Llama run" and "int8" in known["changes"][0]
    assert "int8" in (tmp_path / "int8/README.md").read_text() and (tmp_path / "int8/NOTICE").exists()


def test_a_name_that_the_licence_forbids_is_refused_before_anything_is_written(tmp_path):
    base = llama(tmp_path / "base")
    run = short_run(tmp_path, overrides=["--model", str(base), "--export.name", "support-bot"])
    with pytest.raises(LlmtuneConfigError, match=r"export\.name: the Llama 3\.1 Community License"):
        llmtune.train(run)
    assert not (tmp_path / "run").exists()


def test_no_secret_reaches_a_file_or_a_line(tmp_path):
    """The command itself, among secrets in the environment, the netrc file and an error's text; once to its end, once broken."""
    password = "canary-netrc-0123456789"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {password}\n")
    text = " ".join(CANARIES.values())
    overrides = ["--train.steps", "2", "--evaluate.every", "null", "--evaluate.prompts", json.dumps([text])]
    short_run(tmp_path)
    environment = {**os.environ, **CANARIES, "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llmtune.cli", "train", str(tmp_path / "run.yaml"), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    broken = [
        *command,
        "--data.validation",
        f"https://me:{password}@host/{CANARIES['HF_TOKEN']}.jsonl",
        "--output",
        str(tmp_path / "other"),
    ]
    refused = subprocess.run(broken, env=environment, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "[redacted]" in refused.stderr and len(refused.stderr.splitlines()) == 1
    secrets = [password, *CANARIES.values()]
    secrets = [spelled.encode() for own in secrets for spelled in {own, json.dumps(own)[1:-1]}]
    printed = (done.stdout + done.stderr + refused.stdout + refused.stderr).encode()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20 and b"[redacted]" in (tmp_path / "run/config.yaml").read_bytes()
    for secret in secrets:
        assert secret not in printed
        assert not [path for path in files if secret in path.read_bytes()]
