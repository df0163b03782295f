"""L: a long run takes no more memory, files and threads at its end than after its beginning."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.conftest import ROOT
from tests.reliability.forge import ENVIRONMENT
from tests.reliability.kills import LEAVE
from tests.reliability.tiny import Row, newest

SAVED = 20  # steps between two saves


def soak(forge, ground, steps):
    """L1: saved every 20 steps, evaluated every 100. What Orbax alone leaves behind is measured beside it, and told apart."""
    config = ground.config(
        "l1", steps=steps, every=SAVED, evaluate={"every": 100}, data={"validation": str(ground.path / "rows.jsonl")}
    )
    directory, samples = ground.path / "l1", []
    trainer = forge.train(config, fault=LEAVE)
    while trainer.poll() is None:
        time.sleep(0.25)
        sample = measure(trainer.pid, directory)
        samples += [] if sample is None else [sample]
    points = np.array(samples)
    late = points[points[:, 0] >= steps / 4]
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * 1000
    files, threads = (int(late[:, column].max() - late[:, column].min()) for column in (2, 3))
    growth = float(late[-5:, 2].mean() - late[:5, 2].mean()), float(late[-5:, 3].mean() - late[:5, 3].mean())
    sizes = [size(path) for path in directory.glob("checkpoints/*")]
    orbax = bare(directory / "checkpoints" / str(newest(directory)), steps // SAVED) * 1000 / SAVED / 1000
    figure = (
        f"{steps} steps: memory {slope:+.2f} MB per 1,000 steps, of bare saves by Orbax alone {orbax:+.2f}, open files "
        f"{growth[0]:+.1f} (spread {files}), threads {growth[1]:+.1f} (spread {threads}), {len(sizes)} checkpoints of "
        f"{max(sizes) / 1e6:.2f} MB kept"
    )
    steady = slope - max(orbax, 0.0) < 1 and max(map(abs, growth)) < 5
    ok = trainer.code == 0 and newest(directory) == steps and steady and len(sizes) <= 4
    return Row("L1", "soak: a save each 20 steps, evaluations", figure, ok)


def bare(checkpoint, saves):
    """KB that one save of these arrays leaves in a process that does nothing else."""
    command = [sys.executable, "-m", "tests.reliability.bare_saves", str(checkpoint), str(saves)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(pid, directory):
    """(step, resident MB, open files, threads)."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError):
        return None
    if "VmRSS" not in status:
        return None
    log = directory / "metrics.jsonl"
    done = log.read_bytes().count(b"\n") if log.exists() else 0
    return (done, int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])) if done else None


def size(step):
    return sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
