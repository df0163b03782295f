"""Processes that do not come together: a line that says what to check, and code 75, in place of an abort of JAX."""

import os
import socket
import subprocess
import sys

import pytest

from llmtune import exit_codes
from llmtune.errors import LlmtuneConfigError
from llmtune.training.joining import Place, _absent, _own_name, join
from tests.conftest import ROOT
from tests.processes import free_address, side_by_side

JOIN = """
import sys
from llmtune.training.joining import Place, join
join(Place(sys.argv[1], 2, int(sys.argv[2])), 10.0, 0.5)
"""


FAIL = """
import sys
from llmtune.errors import LlmtuneConfigError
from llmtune.failures import tell
from llmtune.training.joining import Place, ending_at_once, join
from llmtune.training.processes import wait_for_all
from llmtune.training.stopping import Interrupted
with ending_at_once(tell), join(Place(sys.argv[1], 2, int(sys.argv[2])), 500.0, 300.0):
    wait_for_all("both are here")
    if sys.argv[2] == "1":
        raise {"mistake": LlmtuneConfigError("model: a mistake"), "signal": Interrupted(15)}[sys.argv[3]]
    wait_for_all("for ever")
"""


@pytest.fixture
def closed():
    """An address where nobody listens."""
    return free_address()


def wait_in_vain(address, index):
    return subprocess.run(
        [sys.executable, "-c", JOIN, address, str(index)], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_in_vain_says_what_to_check(closed, index):
    done = wait_in_vain(closed, index)
    line = {0: f"not all of the 2 processes have come to {closed}", 1: f"process 0 at {closed} cannot be reached"}[
        index
    ]
    assert done.returncode == exit_codes.RETRY and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"llmtune: error: {line} after 0.5 s (safeguards.join_seconds)")


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("mistake", exit_codes.USAGE, "llmtune: error: model: a mistake\n"),
        pytest.param("signal", exit_codes.TERMINATED, "interrupted\n", marks=pytest.mark.nightly),
    ],
)
def test_what_ends_one_process_ends_it_at_once_with_its_own_code(closed, what, code, line):
    """Long before a heartbeat of 500 s is missed: the other hears of it by the connection."""
    codes, said = side_by_side([[sys.executable, "-c", FAIL, closed, index, what] for index in range(2)], timeout=400)
    assert codes == [exit_codes.RETRY, code], said
    assert "process 1 of 2 is lost (its connection broke)" in said[0] and line in said[1]


def test_the_others_are_told_a_name_where_the_address_is_of_this_machine_alone(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    for address, told in (("127.0.1.1", "node7"), ("10.0.0.7", "10.0.0.7")):
        monkeypatch.setattr(socket, "gethostbyname", lambda name, own=address: own)
        assert _own_name() == told


def test_who_is_missing_is_said_as_far_as_it_is_known(closed):
    assert "no machine is called nowhere.invalid" in _absent(Place("nowhere.invalid:1", 2, 1), 3.0)
    assert "the processes of this run are not all there after 3 s" in _absent(Place(), 3.0)
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        assert f"process 0 at {address} answers, but not all 4 processes are there" in _absent(
            Place(address, 4, 2), 3.0
        )


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken, pytest.raises(LlmtuneConfigError, match=r"port \d+ cannot be had"):
        join(Place(f"localhost:{taken.getsockname()[1]}", 2, 0), 10.0, 1.0)
