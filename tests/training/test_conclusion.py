"""What a run says at its end can be typed as it stands, and what it could not write it says in one line."""

import errno
import io
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import pytest
from rich.console import Console

import llmtune
from llmtune.errors import LlmtuneError
from llmtune.training import announcements
from llmtune.training.display import Display
from llmtune.training.files import write_whole
from llmtune.training.metrics import MetricsFile
from llmtune.training.run_directory import RunDirectory
from tests.training.test_resume import small_run

PROMPT = 'Tim\'s "ball":\n$HOME `x` \\'
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def data(batches, tmp_path_factory):
    from tests.runs import write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", *batches)


def test_the_last_line_is_a_command_that_a_shell_understands(stories, data, tmp_path):
    out = io.StringIO()
    small_run(tmp_path, stories, data, "a run's", train={"steps": 1, "batch_size": 2, "dtype": "float32"},
              evaluate={"prompts": [PROMPT], "max_new_tokens": 2})  # fmt: skip
    run = llmtune.load_run(tmp_path / "a run's.yaml")
    llmtune.train(run, Display(Console(file=out, soft_wrap=True, highlight=False)), devices=jax.devices()[:1])
    typed = out.getvalue().partition("try it: ")[2].strip()
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {typed}"], capture_output=True, text=True).stdout
    assert said.split("\0")[1:-1] == ["generate", str(tmp_path / "a run's"), "--prompt", PROMPT]
    assert shlex.split(typed)[0] == announcements.command()


def test_the_command_is_one_that_the_shell_finds(monkeypatch, tmp_path):
    own = tmp_path / ".venv" / "bin" / "llmtune"
    own.parent.mkdir(parents=True)
    own.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert announcements.command() == str(own)
    monkeypatch.chdir(tmp_path)
    assert announcements.command() == ".venv/bin/llmtune"
    monkeypatch.setenv("PATH", str(own.parent))
    assert announcements.command() == "llmtune"


def test_a_checkpoint_that_does_not_fit_is_not_begun(stories, data, tmp_path, monkeypatch):
    run = small_run(tmp_path, stories, data)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(
        LlmtuneError, match=r"saving a checkpoint failed \(no space left on device: it may take 3\.\d MB"
    ):
        llmtune.train(run, devices=jax.devices()[:1])
    assert not list((tmp_path / "run/checkpoints").iterdir())


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_cannot_be_written_is_named_and_stays_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_whole(path, "one\n")
    monkeypatch.setattr("os.fsync", no_space)  # as write and close, it does not say which file
    with pytest.raises(LlmtuneError, match=r"config\.yaml: cannot be written \(No space left on device\)"):
        write_whole(path, "two\n")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"] and path.read_text() == "one\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_under_the_metrics_is_one_clear_line():
    with pytest.raises(LlmtuneError, match="/dev/full: cannot be written"):
        MetricsFile(Path("/dev/full")).log({"step": 1})


def test_a_directory_whose_first_file_does_not_fit_is_not_left_behind(stories, data, tmp_path, monkeypatch):
    """Else the next try would find a directory that holds no run."""
    run = small_run(tmp_path, stories, data)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", no_space)
        with pytest.raises(LlmtuneError, match=r"config\.yaml: cannot be written"):
            RunDirectory(tmp_path / "run").begin(run, "0", "1")
    assert not (tmp_path / "run").exists()
