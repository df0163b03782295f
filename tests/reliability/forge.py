"""A process that has imported everything and computed nothing. Each trainer is a fork of it: a start costs a second, not ten.

with Forge() as forge:
    trainer = forge.train(config, "--section.key", "value", fault={...})
    trainer.kill(signal.SIGKILL)
    code, said = trainer.wait(), trainer.said
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "PYTHONWARNINGS": "ignore",
}


class Forge:
    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="llmtune-forge-")
        environment = {"JAX_COMPILATION_CACHE_DIR": self._folder.name + "/cache", **os.environ, **ENVIRONMENT}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.forge"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._count, self._started = 0, []
        return self

    def __exit__(self, *error):
        for trainer in self._started:
            if trainer.code is None and trainer.poll() is None:
                trainer.kill(signal.SIGKILL)
                trainer.wait()
        self._server.stdin.close()
        self._server.wait()
        self._folder.cleanup()

    def train(self, config, *arguments, fault=None, environment=None):
        """Start `llmtune train CONFIG ...`; what it says goes into a file."""
        self._count += 1
        log = Path(self._folder.name) / f"{self._count}.log"
        words = ["train", str(config), *map(str, arguments)]
        pid = self.ask(arguments=words, log=str(log), fault=fault, environment=environment or {})
        trainer = Trainer(self, pid, log)
        self._started.append(trainer)
        return trainer

    def ask(self, **request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@dataclass
class Trainer:
    forge: Forge
    pid: int
    log: Path
    code: int | None = None

    def poll(self):
        """The exit code, minus a signal's number where one ended it; None while it runs."""
        if self.code is None:
            self.code = self.forge.ask(poll=self.pid)
        return self.code

    def wait(self, seconds=300.0):
        until = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < until, f"still running after {seconds} s: {self.said[-2000:]}"
            time.sleep(0.01)
        return self.code

    def kill(self, signum):
        os.kill(self.pid, signum)

    @property
    def said(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def serve():
    import warnings

    warnings.simplefilter("ignore")
    import grain  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import tensorboardX  # noqa: F401

    import llmtune.training.loop
    import llmtune.training.supervisor  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            sys.stdout.flush()
            answer = os.fork()
            if not answer:
                be_trainer(**request)
        print(json.dumps(answer), flush=True)


def be_trainer(arguments, log, fault, environment):
    code = 1
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for own in (1, 2):
            os.dup2(opened, own)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        from llmtune.cli import main
        from tests.reliability.faults import install

        install(fault)
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
