"""Services, each with its own package, offline, and read back; what breaks does not take the run with it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmtune
from llmtune.config.file import flat, plain
from llmtune.errors import LlmtuneConfigError
from llmtune.tracking import require_installed
from llmtune.tracking.services import SERVICES
from llmtune.tracking.tracker import Guarded
from tests.conftest import ROOT
from tests.evaluation.runs import short_run

ROWS = [{"step": step, "loss": 3.0 / step, "tokens": 10 * step, "eval_loss": 2.0} for step in (1, 2, 3, 4)]


SESSION = """
import pathlib, sys
from llmtune.tracking import Place
from llmtune.tracking.services import SERVICES
from tests.tracking.test_services import ROWS
name, directory, first = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
tracker = SERVICES[name](Place(directory, "tests", "small", {"train.steps": 4}, first, offline=True))
for row in ROWS[first : first + 2]:
    tracker.log(row)
tracker.close()
"""


def log_twice(name, directory):
    """Two rows, then two more by what goes on after an interruption: each session is a process of its own."""
    for first in (0, 2):
        python(SESSION, name, str(directory), str(first))


def python(code, *arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=300).stdout


def records(content):
    """Of a file in LevelDB's log format, after W&B's own head of seven bytes: blocks of 32 KiB, records in fragments."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last fragment
            yield whole
            whole = b""


def test_wandb_offline_keeps_its_rows_in_the_run_and_goes_on_under_one_id(tmp_path):
    pytest.importorskip("wandb")
    log_twice("wandb", tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    known = (tmp_path / "wandb.id").read_text().strip()
    assert len(files) == 2 and all(file.name == f"run-{known}.wandb" for file in files)
    record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    found = []
    for file in files:
        for data in records(file.read_bytes()):
            record = record_type.FromString(data)
            if record.WhichOneof("record_type") == "history":
                found.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert [(row["step"], row["train/loss"], row["evaluation/loss"]) for row in found] == [
        (row["step"], row["loss"], row["eval_loss"]) for row in ROWS
    ]


def test_mlflow_offline_keeps_its_rows_in_the_run_and_goes_on_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what reads is asked for it too
    tracking = pytest.importorskip("mlflow.tracking")
    log_twice("mlflow", tmp_path)
    client = tracking.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    known = (tmp_path / "mlflow.id").read_text().strip()
    points = [(point.step, point.value) for point in client.get_metric_history(known, "train/loss")]
    assert points == [(row["step"], row["loss"]) for row in ROWS]
    run = client.get_run(known)
    assert run.data.params == {"train.steps": "4"} and run.info.run_name == "small" and run.info.status == "FINISHED"


def test_trackio_keeps_its_rows_in_the_run_and_goes_on_in_one_run(tmp_path):
    pytest.importorskip("trackio")
    log_twice("trackio", tmp_path)
    read = "import json; from trackio.sqlite_storage import SQLiteStorage as S; print(json.dumps(S.get_logs('tests', 'small')))"
    rows = json.loads(python(read, TRACKIO_DIR=str(tmp_path / "trackio")).splitlines()[-1])
    assert [(row["step"], row["train/loss"]) for row in rows] == [(row["step"], row["loss"]) for row in ROWS]


@pytest.mark.parametrize("name", list(SERVICES))
def test_a_run_hands_its_rows_over(tmp_path, name, capsys):
    pytest.importorskip(name)
    if name == "trackio":
        pytest.skip("it reads its place when it is first imported; its own test is a process of its own")
    run = short_run(
        tmp_path, overrides=["--tracking.to", f"[{name}]", "--tracking.offline", "true", "--train.steps", "4"]
    )
    llmtune.train(run)
    assert "takes no more rows" not in capsys.readouterr().out
    assert (tmp_path / "run" / f"{name}.id").exists()


def test_what_breaks_is_said_once_and_training_goes_on():
    said, rows = [], []

    class Broken:
        def log(self, row):
            rows.append(row)
            if len(rows) == 2:
                raise ConnectionError("https://me:password@host gave up\nsecond line")

        def close(self):
            raise AssertionError("it is gone by then")

    tracker = Guarded("wandb", Broken, said.append)
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    assert len(rows) == 2
    assert said == ["note: wandb takes no more rows (https://[redacted]@host gave up); metrics.jsonl goes on"]

    def refuse():
        raise RuntimeError("no API key")

    Guarded("wandb", refuse, said.append).log(ROWS[0])
    assert said[1] == "note: wandb takes no more rows (no API key); metrics.jsonl goes on"


def test_a_service_that_is_not_installed_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    sys.path_importer_cache.clear()
    with pytest.raises(
        LlmtuneConfigError, match=r"^tracking.to: wandb is not installed; pip install 'llmtune\[track\]'"
    ):
        require_installed(["wandb"])


def test_tracking_may_change_when_a_run_goes_on(tmp_path):
    run = short_run(tmp_path, overrides=["--train.steps", "2", "--tracking.project", "one"])
    llmtune.train(run)
    again = short_run(tmp_path, overrides=["--train.steps", "2", "--tracking.project", "two"])
    llmtune.train(again)
    assert flat(plain(again))["tracking.project"] == "two" and Path(again.output).is_dir()
