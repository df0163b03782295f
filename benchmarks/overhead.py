"""What looking after a run costs: steps with checkpoints, digests and tracking, and bare steps, in turn, in one run.

    python -m benchmarks.overhead                       25 M parameters, full and LoRA, saved every 50 steps
    python -m benchmarks.overhead --every 50 --pairs 4 --method lora

Both sides are the program that `llmtune train` runs, and both fetch the loss of each step. The other side also makes the row,
writes it to metrics.jsonl and TensorBoard, digests and saves the state at its first step, and has it committed before its last
is over: what a save does behind the steps is in their time. Beside the ratio of seconds stands that of the CPU seconds
of all threads, the steadier one on a machine that others use too.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.shapes import SHAPES, write_model
from llmtune import pretrained
from llmtune.config.file import build_run
from llmtune.models.decoder import declare
from llmtune.tracking import All, TensorBoard
from llmtune.training.checkpoint.checkpoints import Checkpoints
from llmtune.training.checkpoint.retention import Retention
from llmtune.training.meter import Meter
from llmtune.training.metrics import MetricsFile
from llmtune.training.program import build_program
from llmtune.training.watchdog import Watchdog
from llmtune.training.weights import choose_layout


class Sides:
    """The same steps, bare and looked after; the state goes on from one to the other."""

    def __init__(self, folder, model, settings):
        adapt = {"adapt": {"rank": 8, "alpha": 16}} if settings.method == "lora" else {}
        tree = {"model": str(model), "output": str(folder), "data": {"train": "unused"}, "objective": "pretrain",
                "train": {"batch_size": settings.batch, "dtype": settings.dtype, "steps": 10**6}, **adapt}  # fmt: skip
        run = build_run(tree, "benchmark")
        source = pretrained.open_source(run.model)
        mesh, strategy = choose_layout(None, declare(source.config)[1], jax.devices()[:1])
        jax.set_mesh(mesh)
        self.program, self.state = build_program(run, source, 10**6, mesh, strategy, lambda done: None)
        shape = (settings.batch, settings.length)
        tokens = np.random.default_rng(0).integers(3, SHAPES["25m"]["vocab_size"], shape).astype(np.int32)
        positions = np.broadcast_to(np.arange(settings.length, dtype=np.int32), shape)
        self.rows = {"tokens": tokens, "labels": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
        self.step, _ = self.program.compile(self.state, self.program.place(self.rows))
        self.trackers = All((MetricsFile(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard", 0)))
        self.meter = Meter(self.program.work, (), lambda step: {"epoch": 0.0}, 0.0, time.time())
        self.checkpoints = Checkpoints(folder / "checkpoints", Retention(3), {}, 1, print)
        self.checkpoints.__enter__()  # held until the process ends
        self.number, self.every = 0, settings.every

    def bare(self):
        begun = time.perf_counter()
        for _ in range(self.every):
            self.state, metrics = self.step(self.state, self.program.frozen, self.program.place(self.rows))
            self.number += 1
            jax.device_get(metrics)
        return time.perf_counter() - begun

    def looked_after(self):
        begun = time.perf_counter()
        with Watchdog(300.0, Path("hang.txt")) as watchdog:
            for index in range(self.every):
                self.state, metrics = self.step(self.state, self.program.frozen, self.program.place(self.rows))
                self.number += 1
                row = self.meter.row(self.number, metrics)
                watchdog.alive()
                self.trackers.log(row)
                if not self.checkpoints.has_failed() and index == 0:
                    self.checkpoints.save(self.number, self.state, row)
                self.meter.start()
            self.checkpoints.wait()
        return time.perf_counter() - begun


def measure(folder, model, settings):
    sides, ratios, bare = Sides(folder, model, settings), {"wall": [], "CPU": []}, []
    sides.bare(), sides.looked_after()  # compiles digests, opens files
    for pair in range(settings.pairs):
        order = (sides.bare, sides.looked_after) if pair % 2 == 0 else (sides.looked_after, sides.bare)
        wall, cpu = {}, {}
        for work in order:
            begun = time.process_time()
            wall[work.__name__] = work()
            cpu[work.__name__] = time.process_time() - begun
        for name, seconds in (("wall", wall), ("CPU", cpu)):
            ratios[name].append(seconds["looked_after"] / seconds["bare"])
        bare.append(wall["bare"] / settings.every)
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(sides.state)) / 1e6
    print(
        f"{settings.method}: {megabytes:,.0f} MB saved every {settings.every} steps of {statistics.median(bare) * 1e3:,.0f} ms"
    )
    for name, own in ratios.items():
        pairs = ", ".join(f"{ratio:.3f}" for ratio in own)
        print(f"  {name} seconds: x {statistics.median(own):.3f} (pairs: {pairs})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method", choices=("full", "lora"), default=None)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmtune-overhead-") as folder:
        model = write_model(Path(folder) / "model", "25m", "float32")
        for method in (settings.method,) if settings.method else ("lora", "full"):
            settings.method = method
            measure(Path(folder) / method, model, settings)


if __name__ == "__main__":
    main()
