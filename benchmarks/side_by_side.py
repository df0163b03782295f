"""Two programs measured in turn, in one run: each in its own process, both ready before either is timed.

    parent: "go"  ->  llmtune works twice, the peer sleeps  ->  seconds of the second time
    parent: "go"  ->  the peer works twice, llmtune sleeps  ->  seconds of the second time

That is a pair; the ratio of a run is the median of its pairs. What is asked is the speed of work that goes on: on a virtual
machine the first work after a pause of seconds is up to a fifth slower, caches being cold, and the host's memory and clock
with others.

On a noisy machine absolute figures drift from minute to minute; the two halves of a pair stand seconds apart, so their
ratio holds still. Which side goes first alternates.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Prepare = Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[], float]]]  # settings -> facts, a piece of work


def parser(doc: str | None) -> argparse.ArgumentParser:
    """What every benchmark can be told; its own arguments are added to these."""
    own = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--pairs", type=int, default=8, help="pairs of measurements")
    own.add_argument("--json", type=Path, help="also write the figures here")
    own.add_argument("--worker", choices=("llmtune", "peer"), help=argparse.SUPPRESS)
    return own


def run(own: argparse.ArgumentParser, llmtune: Prepare, peer: Prepare, measure: Callable[..., dict[str, Any]]) -> None:
    """As a worker serve that side; else `measure(arguments)`, which compares, and write the figures that it gives."""
    given = own.parse_args()
    if given.worker:
        with contextlib.redirect_stdout(None):
            serve({"llmtune": llmtune, "peer": peer}[given.worker])
        return
    results = measure(given)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def serve(prepare: Prepare) -> None:
    """The worker's side: settings in on stdin, facts out, then seconds of one piece of work for each line that comes."""
    settings = json.loads(sys.stdin.readline())
    facts, work = prepare(settings)
    _say(facts)
    for _ in sys.stdin:
        work()
        seconds = work()
        _say({"seconds": seconds, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def _say(message: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(message) + "\n")
    sys.__stdout__.flush()


@dataclass
class Worker:
    """One side: a process that waits to be told to work."""

    name: str
    module: str
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_rss: int = 0

    def __enter__(self) -> "Worker":
        command = [sys.executable, "-m", self.module, "--worker", self.name]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._tell(json.dumps(self.settings))
        return self

    def ready(self) -> None:
        """Wait until it has prepared its work, which both sides may do at the same time."""
        self.facts = self._hear()

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def work(self) -> float:
        """Seconds of one piece of work."""
        self._tell("go")
        heard = self._hear()
        self.seconds.append(heard["seconds"])
        self.peak_rss = heard["peak_rss"]
        return heard["seconds"]

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the worker ended (exit code {self.process.wait()}); its message is above")
        return json.loads(line)


def compare(module: str, settings: dict[str, Any], *, pairs: int, units: float, unit: str, warmup: int = 1) -> dict:
    """Run llmtune and the peer in turn and print a line for each; `units` are done in one piece of work."""
    with Worker("llmtune", module, settings) as ours, Worker("peer", module, settings) as peer:
        for side in (ours, peer):
            side.ready()
        for _ in range(warmup):
            ours.work(), peer.work()
        ours.seconds.clear(), peer.seconds.clear()
        for pair in range(pairs):
            for side in (ours, peer) if pair % 2 == 0 else (peer, ours):
                side.work()
        ratios = [theirs / own for own, theirs in zip(ours.seconds, peer.seconds, strict=True)]
        result: dict[str, Any] = {"settings": settings, "pairs": pairs, "ratio": statistics.median(ratios)}
        result["ratio_range"] = [min(ratios), max(ratios)]
        for side in (ours, peer):
            rate = units / statistics.median(side.seconds)
            result[side.name] = {unit: rate, "peak_rss": side.peak_rss, **side.facts}
            extra = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                              for key, value in side.facts.items())  # fmt: skip
            print(
                f"  {side.name:8s} {rate:>11,.1f} {unit}  peak RSS {side.peak_rss / 1e6:,.0f} MB  {extra}", flush=True
            )
    low, high = result["ratio_range"]
    print(f"  ratio    {result['ratio']:.3f} (median of {pairs} pairs, {low:.3f} to {high:.3f})", flush=True)
    return result
