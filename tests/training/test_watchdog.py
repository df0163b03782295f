"""A hang ends with code 70 and says where; what is only slow does not."""

import subprocess
import sys

from llmtune import exit_codes

SCRIPT = """
import sys, time
from pathlib import Path
from llmtune.training.watchdog import Watchdog

def waits_for_ever():
    time.sleep(60)

with Watchdog(float(sys.argv[1]), Path(sys.argv[2])) as watchdog:
    for _ in range(5):
        time.sleep(float(sys.argv[3]))
        watchdog.alive()
    with watchdog.paused():
        time.sleep(float(sys.argv[1]) * 2)
    time.sleep(float(sys.argv[1]) * 2 if float(sys.argv[3]) > 0.1 else 0)  # of twenty usual steps, not yet half
    print("alive", flush=True)
    waits_for_ever()
"""


def test_a_hang_is_ended_and_shown(tmp_path):
    command = [sys.executable, "-c", SCRIPT, "0.6", str(tmp_path / "hang.txt"), "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (exit_codes.HUNG, "alive\n")
    assert done.stderr.startswith("llmtune: error: no step was finished for 1 s; the stacks of all threads are in")
    assert "waits_for_ever" in (tmp_path / "hang.txt").read_text()


def test_a_run_of_slow_steps_is_given_their_time(tmp_path):
    command = [
        sys.executable,
        "-c",
        SCRIPT.replace("    waits_for_ever()\n", ""),
        "0.5",
        str(tmp_path / "hang.txt"),
        "0.3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_where_no_file_can_be_written_the_stacks_go_to_stderr(tmp_path):
    command = [sys.executable, "-c", SCRIPT, "0.6", str(tmp_path / "absent/hang.txt"), "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == exit_codes.HUNG and "waits_for_ever" in done.stderr
