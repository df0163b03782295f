"""L: a long run takes no more memory, files and threads at its end than after its beginning."""

import os
import time
from pathlib import Path

import numpy as np

from tests.reliability.kills import LEAVE
from tests.reliability.tiny import Row, newest, rows_of


def soak(forge, ground, steps):
    """L1: saved every 20 steps, evaluated every 100."""
    config = ground.config(
        "l1", steps=steps, every=20, evaluate={"every": 100}, data={"validation": str(ground.path / "rows.jsonl")}
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
    figure = (
        f"{steps} steps: memory {slope:+.2f} MB per 1,000 steps, open files {growth[0]:+.1f} (spread {files}), "
        f"threads {growth[1]:+.1f} (spread {threads}), {len(sizes)} checkpoints of {max(sizes) / 1e6:.2f} MB kept"
    )
    steady = slope < 1 and max(map(abs, growth)) < 5
    ok = trainer.code == 0 and newest(directory) == steps and steady and len(sizes) <= 4
    return Row("L1", "soak: a save each 20 steps, evaluations", figure, ok)


def measure(pid, directory):
    """(step, resident MB, open files, threads)."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError):
        return None
    if "VmRSS" not in status:
        return None
    done = len(rows_of(directory))
    return (done, int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])) if done else None


def size(step):
    return sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
