"""`llmtune train CONFIG --supervise`: a parent, outside JAX, that starts the run again when something ends it.

    start the processes  -->  one ends  -->  all are ended  -->  did it help to start?  -->  start again, or give up

When one process of a run dies the others are aborted, and no `finally` of theirs runs: so recovery lives here. Starting again
helps as long as checkpoints come: after `restarts` in a row without a new one the supervisor gives up, and says why.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtune import exit_codes
from llmtune.training.checkpoint.steps import steps_on_disk
from llmtune.training.goodput import goodput, record
from llmtune.training.stopping import Stop

PARENT = "LLMTUNE_SUPERVISOR"  # in the environment of a process: who looks after it
POLL_SECONDS, LONGEST_PAUSE = 0.1, 30.0
MEANING = {
    1: "failed",
    exit_codes.HUNG: "hung",
    exit_codes.RETRY: "lost another process, or failed to save",
    exit_codes.INTERRUPTED: "was asked to stop by SIGINT",
    exit_codes.TERMINATED: "was asked to stop by SIGTERM",
}


@dataclass
class Supervisor:
    """`arguments`: of `llmtune train`, without those that are the supervisor's; `output`: the run's directory.

    `command`: what a process is started with; `restarts`: so many in a row may bring no new checkpoint; `grace`: seconds that
    the other processes have to notice a loss; `say`: where a person reads a line.
    """

    arguments: Sequence[str]
    output: Path
    processes: int = 1
    restarts: int = 3
    grace: float = 20.0
    say: Callable[[str], None] = print
    command: Sequence[str] = (sys.executable, "-m", "llmtune.cli", "train")
    workers: list[subprocess.Popen] = field(default_factory=list)

    def run(self, stop: Stop) -> int:
        """The exit code of the whole: of the run where it ended for good, 76 where it was given up."""
        began, first, fruitless, restarts = time.monotonic(), self._newest(), 0, 0
        with stop.deferred():
            while True:
                before, started = self._newest(), time.monotonic()
                self._start()
                codes = self._wait(stop)
                if stop.signal:
                    return 128 + stop.signal
                ended = [code for code in codes if code in exit_codes.FINAL]
                if ended and (max(ended) > 0 or len(ended) == len(codes)):
                    self._account(first, time.monotonic() - began, restarts)
                    return max(ended)
                fruitless = 0 if self._newest() > before else fruitless + 1
                cause, lived = _cause(codes), time.monotonic() - started
                if fruitless > self.restarts:
                    print(self._storm(fruitless, cause, lived), file=sys.stderr)
                    return exit_codes.GAVE_UP
                restarts += 1
                self.say(
                    f"supervisor: {cause} after {lived:.0f} s, at step {self._newest()}; starting again ({restarts})"
                )
                self._pause(min(fruitless, LONGEST_PAUSE), stop)
                if stop.signal:
                    return 128 + stop.signal

    def _newest(self) -> int:
        return max(steps_on_disk(self.output / "checkpoints"), default=0)

    def _account(self, first: int, wall_seconds: float, restarts: int) -> None:
        found = goodput(self.output / "metrics.jsonl", first, wall_seconds, restarts)
        record(self.output / "run.json", found)
        self.say(
            f"goodput: {found['goodput']:.1%} ({found['training_seconds']:.1f} s of training in {wall_seconds:.1f} s, "
            f"{restarts} restart{'' if restarts == 1 else 's'})"
        )

    def _start(self) -> None:
        self.workers, address = [], _free_address()
        for index in range(self.processes):
            place = ["--coordinator", address, "--processes", str(self.processes), "--process", str(index)]
            command = [*self.command, *self.arguments]
            environment = {**os.environ, PARENT: str(os.getpid())}
            if self.processes > 1:
                command += place
                environment.setdefault("JAX_LOCAL_DEVICE_IDS", str(index))  # of the GPUs, one for each process
            # in a session of its own: what a terminal sends to its group comes to the supervisor alone, which passes it on
            self.workers.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def _wait(self, stop: Stop) -> list[int]:
        """Until all have ended: by themselves, asked to, or killed once another has been gone for `grace` seconds."""
        asked, deadline = False, float("inf")
        while None in (codes := [worker.poll() for worker in self.workers]):
            if stop.signal and not asked:
                self._signal(stop.signal)
                asked = True
            if deadline == float("inf") and any(codes):
                deadline = time.monotonic() + self.grace
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        return [worker.returncode for worker in self.workers]

    def _signal(self, signum: int) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signum)

    def _pause(self, seconds: float, stop: Stop) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not stop.signal:
            time.sleep(POLL_SECONDS)

    def _storm(self, fruitless: int, cause: str, lived: float) -> str:
        return (
            f"llmtune: error: given up after {fruitless} starts in a row without a new checkpoint ({cause}, {lived:.0f} s "
            f"after the last start; the newest checkpoint is of step {self._newest()}); mend what ends it, or lower "
            "checkpoint.every so that a checkpoint comes before it does"
        )


def _free_address() -> str:
    with socket.create_server(("localhost", 0)) as free:
        return f"localhost:{free.getsockname()[1]}"


def _cause(codes: Sequence[int]) -> str:
    """What ended first, as far as codes tell: a signal from outside before what followed from it."""
    order = [-signal.SIGKILL, -signal.SIGSEGV, exit_codes.HUNG, 1, exit_codes.TERMINATED, exit_codes.INTERRUPTED]
    index, code = min(
        ((index, code) for index, code in enumerate(codes) if code),
        key=lambda own: order.index(own[1]) if own[1] in order else len(order),
    )
    what = f"was ended by {signal.Signals(-code).name}" if code < 0 else MEANING.get(code, f"ended with code {code}")
    return f"process {index} {what}" if len(codes) > 1 else f"it {what}"
