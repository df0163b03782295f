"""What the supervisor does with the ends of processes. These are small scripts; runs are in tests/reliability."""

import json
import signal
import sys
import threading
import time

import pytest

from llmtune import exit_codes
from llmtune.training.stopping import Stop
from llmtune.training.supervisor import Supervisor

# A run of 4 steps; its nth start ends as the nth of its plan says: a code, or minus a signal. "+": after one more checkpoint.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
plan, output = json.loads(sys.argv[1]), Path(sys.argv[2])
index = sys.argv[sys.argv.index("--process") + 1] if "--process" in sys.argv else "0"
starts = output / f"starts-{index}"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
way = plan[min(number, len(plan) - 1)]
way = way if isinstance(way, str) else way[index]
if way[0] == "+":
    step = len(list((output / "checkpoints").iterdir())) + 1
    (output / "checkpoints" / str(step)).mkdir()
    with open(output / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "tokens": 10, "tokens_per_second": 1000.0}) + chr(10))
if way.endswith("wait"):
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waiting", flush=True)
    time.sleep(60)
code = int(way.lstrip("+"))
if code < 0:
    os.kill(os.getpid(), -code)
    time.sleep(60)
sys.exit(code)
"""


def supervise(output, *plan, stop=None, **options):
    """(exit code, what was said, how often it was started)."""
    (output / "checkpoints").mkdir()
    (output / "run.json").write_text('{"sessions": []}')
    said = []
    supervisor = Supervisor(
        [json.dumps(plan), str(output)], output, say=said.append, command=[sys.executable, "-c", SCRIPT],
        **{"restarts": 2, "grace": 1.0, **options},
    )  # fmt: skip
    code = supervisor.run(stop or Stop())
    return code, said, len((output / "starts-0").read_text())


@pytest.fixture
def output(tmp_path):
    return tmp_path


def test_what_is_around_a_run_is_overcome(output):
    code, said, starts = supervise(output, "+-9", "+75", "+70", "+1", "+143", "+0")
    assert (code, starts) == (0, 6)
    causes = ("was ended by SIGKILL", "lost another process", "hung", "failed", "was asked to stop by SIGTERM")
    assert all(cause in line for cause, line in zip(causes, said, strict=False))
    assert said[-1].startswith("goodput: ") and "(0.1 s of training in" in said[-1] and "5 restarts)" in said[-1]
    recorded = json.loads((output / "run.json").read_text())["supervised"]
    assert recorded["restarts"] == 5 and 0 < recorded["goodput"] < 1 and recorded["training_seconds"] == 0.06


@pytest.mark.parametrize("code", [exit_codes.USAGE, exit_codes.GAVE_UP])
def test_what_starting_again_does_not_mend_ends_it(output, code):
    assert supervise(output, str(code))[::2] == (code, 1)


def test_a_storm_is_given_up_and_said(output, capfd):
    code, said, starts = supervise(output, "-9")
    assert (code, starts) == (exit_codes.GAVE_UP, 3) and len(said) == 2
    error = capfd.readouterr().err
    assert "given up after 3 starts in a row without a new checkpoint (it was ended by SIGKILL" in error
    assert "lower checkpoint.every" in error and error.count("\n") == 1


def test_progress_starts_the_count_again(output):
    assert supervise(output, "-9", "-9", "+-9", "-9", "-9", "+0")[::2] == (0, 6)


def test_processes_that_do_not_notice_a_loss_are_ended(output):
    """Process 1 dies at once, process 0 would wait for a minute."""
    begun = time.monotonic()
    code, _, starts = supervise(output, {"0": "wait", "1": "-9"}, {"0": "0", "1": "0"}, processes=2)
    assert (code, starts) == (0, 2) and time.monotonic() - begun < 30


def test_a_signal_is_passed_on_and_waited_for(output):
    stop = Stop()
    timer = threading.Timer(2.0, lambda: setattr(stop, "signal", signal.SIGTERM))
    timer.start()
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        supervise(output, "wait", stop=stop)
    assert json.loads((output / "run.json").read_text()) == {"sessions": []}
