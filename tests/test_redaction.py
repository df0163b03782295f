"""Secrets are taken out of what is written; nothing else is."""

import json
import os
import subprocess
import sys

import pytest

from llmtune.redaction import MARK, redact, redact_tree
from tests.conftest import ROOT
from tests.reliability.forge import ENVIRONMENT
from tests.reliability.tiny import Ground

CANARY = "c4n4ry-0123456789"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://me:pw@host/x?y=1", f"see https://{MARK}@host/x?y=1"),
        ("see https://token@host:80/x", f"see https://{MARK}@host:80/x"),
        ("https://host/x?token=abcdefghij&z=1", f"https://host/x?token={MARK}&z=1"),
        ("Authorization: Bearer abc.DEF-123456", f"Authorization: Bearer {MARK}"),
        ("hf_" + "aB3" * 11, MARK),
        ("sk-proj-" + "x1" * 20, MARK),
        ("AKIAIOSFODNN7EXAMPLE", MARK),
        ("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----", MARK),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "runs/hf_directory/model", "meta-llama/Llama-3.1-8B", "https://host/a@b", "mail me@host", "task-force-one-two-three",
        "learning_rate: 2.0e-4", "sha256 " + "0123456789abcdef" * 4, "key=value", "a bearer of news",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_the_environment_are_secrets_by_their_variables_name(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "BASIC_AUTH"):
        monkeypatch.setenv(name, f'{name}-{CANARY}"\\')
        assert redact(f'a {name}-{CANARY}"\\ b') == f"a {MARK} b"
        written = json.dumps({"reason": f'{name}-{CANARY}"\\'})
        assert CANARY not in redact(written) and json.loads(redact(written)) == {"reason": MARK}
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long")
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))  # a path is none
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = f"false-but-long {tmp_path} true"
    assert redact(text) == text
    monkeypatch.delenv("HF_TOKEN")
    assert redact(f"HF_TOKEN-{CANARY}") == f"HF_TOKEN-{CANARY}"


def test_passwords_of_netrc_are_secrets(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {CANARY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert redact_tree({"a": [f"x{CANARY}", 1, None], "b": {"c": CANARY}}) == {
        "a": [f"x{MARK}", 1, None],
        "b": {"c": MARK},
    }


def test_a_traceback_that_nobody_expects_tells_no_secret(tmp_path):
    """The real command, in a process of its own, where a part of it fails with a secret in its text."""
    ground, environment = (
        Ground(tmp_path),
        {**os.environ, **ENVIRONMENT, "CANARY_TOKEN": CANARY, "PYTHONPATH": str(ROOT)},
    )

    def said(at):
        fault = json.dumps({"do": "tell", "at": at})
        command = [sys.executable, "-m", "tests.reliability.faults", fault, str(ground.config("run", steps=2))]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        return ended.returncode, ended.stdout + ended.stderr

    code, text = said("llmtune.training.loop:load_data")
    assert code == 1 and "Traceback" in text and f"with {MARK} in hand" in text and CANARY not in text, text
    code, text = said("llmtune.training.checkpoint.commit:describe_files")  # what fails in a save is one line
    assert code == 0 and "Traceback" not in text and f"with {MARK} in hand" in text and CANARY not in text, text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
