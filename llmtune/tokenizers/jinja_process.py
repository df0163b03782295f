"""Renders chat templates in a confined process: started when first needed, kept alive, replaced when it is ended.

process = TemplateProcess(source, "tokenizer_config.json")
process.render([job, job, ...])     # one answer for each, in order
"""

import contextlib
import importlib.util
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from llmtune.errors import LlmtuneFormatError
from llmtune.tokenizers import jinja_worker

PATIENCE = jinja_worker.SECONDS + 10  # until a worker that should have ended itself is ended
INHERITED = ("PATH", "LD_LIBRARY_PATH", "TZ")
FRAME = 2**20  # characters of jobs that go into one message


@final
@dataclass(frozen=True)
class Render:
    """One rendering asked for: the template's variables, and the messages whose beginnings are wanted."""

    variables: dict[str, Any]
    prefixes: tuple[int, ...] = ()


@final
@dataclass(frozen=True)
class Text:
    """One rendering.

    `spans` are the bodies of generation blocks; `starts` the lengths of the beginnings, or such a beginning itself where the
    text does not begin with it, None where the template refuses it.
    """

    text: str
    spans: list[tuple[int, int]]
    starts: list[int | str | None]


@final
@dataclass(frozen=True)
class Failure:
    """Why a job has no rendering."""

    why: str


def job(*renders: Render) -> str:
    """Renders that share the time of one job; TypeError, ValueError or RecursionError where variables are no JSON."""
    return json.dumps([{"variables": render.variables, "prefixes": render.prefixes} for render in renders])


@final
class TemplateProcess:
    """One template and the process that renders it. Threads may share it; they take turns."""

    def __init__(self, source: str, name: str) -> None:
        self.source, self.name = source, name
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def check(self) -> None:
        """Start it, which compiles the template; LlmtuneFormatError where that fails."""
        with self._lock:
            self._started()

    def render(self, jobs: Sequence[str]) -> list[list[Text] | Failure]:
        """An answer for every `job`, in order. One that outruns its limits ends the process and is a Failure."""
        answers: list[list[Text] | Failure] = []
        with self._lock:
            while len(answers) < len(jobs):
                stop, size = len(answers) + 1, len(jobs[len(answers)])
                while stop < len(jobs) and size + len(jobs[stop]) <= FRAME:
                    size += len(jobs[stop])
                    stop += 1
                answers += self._answers(jobs[len(answers) : stop])
        return answers

    def _answers(self, jobs: Sequence[str]) -> list[list[Text] | Failure]:
        """Of as many jobs as the process survives, the one that ended it included."""
        worker = self._started()
        answers: list[list[Text] | Failure] = []
        try:
            _send(worker, "[" + ",".join(jobs) + "]")
            for _ in jobs:
                answers.append(_understood(_receive(worker)))
        except (OSError, EOFError):
            answers.append(Failure(_end(worker)))
            self._worker = None
        return answers

    def _started(self) -> subprocess.Popen[bytes]:
        if (
            self._worker is not None and self._owner == os.getpid()
        ):  # not that of the process that this one was forked from
            return self._worker
        worker = _start()
        try:
            _send(worker, json.dumps(self.source))
            failed = _receive(worker).get("failed")
        except (OSError, EOFError):
            failed = _end(worker)
        if failed is not None:
            _end(worker)
            raise LlmtuneFormatError(f"chat template {self.name}: {failed}")
        self._worker, self._owner = worker, os.getpid()
        weakref.finalize(self, _close, worker, self._owner)
        return worker


def _start() -> subprocess.Popen[bytes]:
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = dict.fromkeys(str(Path(spec.origin).parent.parent) for spec in found if spec is not None and spec.origin)
    return subprocess.Popen(
        [sys.executable, "-I", jinja_worker.__file__, *folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in INHERITED if name in os.environ},
        cwd="/",
    )


def _send(worker: subprocess.Popen[bytes], text: str) -> None:
    assert worker.stdin is not None
    raw = text.encode("ascii")
    worker.stdin.write(struct.pack(">I", len(raw)) + raw)
    worker.stdin.flush()


def _receive(worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    return json.loads(_read(worker, struct.unpack(">I", _read(worker, 4))[0]))


def _read(worker: subprocess.Popen[bytes], size: int) -> bytes:
    assert worker.stdout is not None
    parts = bytearray()
    while len(parts) < size:
        ready, _, _ = select.select([worker.stdout], [], [], PATIENCE)
        part = os.read(worker.stdout.fileno(), min(size - len(parts), 2**20)) if ready else b""
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _understood(answer: dict[str, Any]) -> list[Text] | Failure:
    if "failed" in answer:
        return Failure(answer["failed"])
    return [Text(a["text"], [(b, e) for b, e in a["spans"]], a["starts"]) for a in answer["given"]]


def _close(worker: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker that is no longer wanted, but not from a fork: there it is the parent's."""
    if os.getpid() == owner and worker.poll() is None:
        worker.kill()
        _end(worker)


def _end(worker: subprocess.Popen[bytes]) -> str:
    """End a worker, if it has not ended; why it had."""
    try:
        code = worker.wait(0.05)
    except subprocess.TimeoutExpired:
        code = None
        worker.kill()
        worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not sent cannot be
                stream.close()
    if code is None or -code == signal.SIGALRM:
        return f"rendering takes more than {jinja_worker.SECONDS} s"
    return f"rendering needs more than {jinja_worker.MEMORY // 2**20} MiB of memory, or broke the process"
