"""The first signal asks, the second ends; in processes of their own."""

import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import sys, time
from llmtune.training.stopping import Interrupted, on_signals
try:
    with on_signals() as stop:
"""
END = """
except Interrupted as error:
    print("stopped", error, flush=True)
    sys.exit(error.exit_code)
"""
PLAIN = """
        print("ready", flush=True)
        time.sleep(60)
"""
DEFERRED = """
        with stop.deferred():
            print("ready", flush=True)
            while not stop.signal:
                time.sleep(0.01)
            print("saved", flush=True)
"""
DEAF = """
        with stop.deferred():  # as in a compiler: no instruction of Python runs in the main thread
            import ctypes
            print("ready", flush=True)
            ctypes.CDLL(None).sleep(60)
            while True:
                ctypes.CDLL(None).sleep(60)
"""


def start(body):
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + body + END], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("body", "said"), [(PLAIN, "stopped"), (DEFERRED, "saved\nstopped")])
def test_the_first_signal_asks(body, said, signum, code):
    process = start(body)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, f"{said} {signum.name}\n"), err
    assert err == (
        "" if body is PLAIN else f"{signum.name}: the step is finished and saved first; once more ends at once\n"
    )


def test_the_second_ends_wherever_the_process_is():
    process = start(DEAF)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert process.wait(timeout=10) == 143
