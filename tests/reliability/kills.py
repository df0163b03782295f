"""A: kill -9 at random, at each stroke of a commit, SIGTERM, and a storm of kills."""

import contextlib
import io
import json
import re
import signal
import sys
import time

import numpy as np

from llmtune import exit_codes
from llmtune.training.stopping import Stop
from llmtune.training.supervisor import Supervisor
from tests.reliability.faults import COMMIT_POINTS
from tests.reliability.tiny import FULL, LORA, Row, curve, newest, rows_of, state_hash

LEAVE = {"do": "leave", "at": "llmtune.training.loop:export_run"}  # all that is compared is on disk by then


def kill_at_random(forge, ground, kills, steps):
    """A1. Kill times are uniform over 0 to 2 times what the first checkpoint of a start takes, from its first step on."""
    done, lost, failed, in_save, points, different = 0, 0, 0, 0, set(), 0
    for kind, adapt, share in (("lora", LORA, kills // 2), ("full", FULL, kills - kills // 2)):
        config, whole = ground.config(f"a1-{kind}", steps=steps, adapt=adapt), ground.path / f"a1-{kind}"
        trainer = forge.train(config, fault=LEAVE)
        interval, random, at = first_commit(trainer, whole), np.random.default_rng(kills), 0
        assert trainer.wait() == 0
        while share > 0:
            at += 1
            config, directory = (
                ground.config(f"a1-{kind}-{at}", steps=steps, adapt=adapt),
                ground.path / f"a1-{kind}-{at}",
            )
            expected = 0
            while True:
                before = len(rows_of(directory))
                trainer = forge.train(config, fault=LEAVE)
                if share > 0:
                    while trainer.poll() is None and len(rows_of(directory)) in (before, 0):
                        time.sleep(0.002)
                        before = min(before, len(rows_of(directory)))
                    time.sleep(random.uniform(0, 2 * interval))
                    saving = any(directory.glob("checkpoints/*.partial*"))
                    if trainer.poll() is None:
                        trainer.kill(signal.SIGKILL)
                        share, done, in_save = share - 1, done + 1, in_save + saving
                code = trainer.wait()
                found = re.search(r"resuming after step (\d+)", trainer.said)
                resumed = int(found.group(1)) if found else 0
                lost += resumed < expected
                failed += code not in (0, -signal.SIGKILL)
                points.add((kind, at, resumed))
                expected = newest(directory)
                if code == 0 or failed:
                    break
            different += (curve(directory), state_hash(directory)) != (curve(whole), state_hash(whole))
            if failed:
                break
    figure = (
        f"{done} kills, {in_save} inside a save ({in_save / max(done, 1):.0%}), {len(points)} restart points: "
        f"{lost} committed steps lost, {failed} failed restarts, {different} runs of another curve or state"
    )
    ok = done >= kills and in_save >= 0.3 * done and not (lost or failed or different)
    return Row("A1", "kill -9 at random, LoRA and full", figure, ok)


def first_commit(trainer, directory):
    """Seconds from the first step of a start to its first checkpoint."""
    begun = None
    while trainer.poll() is None and not newest(directory):
        time.sleep(0.002)
        begun = begun or (time.monotonic() if rows_of(directory) else None)
    return max(0.02, time.monotonic() - (begun or time.monotonic()))


def kill_at_each_stroke(forge, ground, points=COMMIT_POINTS):
    """A2."""
    whole = ground.path / "a2"
    assert forge.train(ground.config("a2", steps=6, keep=1), fault=LEAVE).wait() == 0
    recovered, wrong = 0, []
    for number, (name, fault) in enumerate(points.items()):
        config, directory = ground.config(f"a2-{number}", steps=6, keep=1), ground.path / f"a2-{number}"
        killed = forge.train(config, fault={"do": "kill", **fault}).wait()
        ended = forge.train(config, fault=LEAVE).wait()
        left = [path.name for path in directory.glob("checkpoints/*") if not path.name.isdecimal()]
        same = (curve(directory), state_hash(directory)) == (curve(whole), state_hash(whole))
        good = killed == -signal.SIGKILL and ended == 0 and same and not left
        recovered += good
        wrong += [] if good else [name]
    figure = f"{recovered} of {len(points)} points recover" + (f" (not: {', '.join(wrong)})" if wrong else "")
    return Row("A2", "kill -9 at each stroke of a commit", figure, recovered == len(points) >= 8)


def ask_to_stop(forge, ground, times, patience=15):
    """A3, one process: SIGTERM and SIGINT at random moments of a run."""
    whole = ground.path / "a3-whole"
    assert forge.train(ground.config("a3-whole", steps=20 * times, every=1000), fault=LEAVE).wait() == 0
    config, directory = ground.config("a3", steps=20 * times, every=1000), ground.path / "a3"
    saved, lost, slowest, random = 0, 0, 0.0, np.random.default_rng(3)
    for number in range(times):
        signum, trainer, before = (
            (signal.SIGTERM, signal.SIGINT)[number % 2],
            forge.train(config, fault=LEAVE),
            newest(directory),
        )
        while trainer.poll() is None and len(rows_of(directory)) <= before:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        begun = time.monotonic()
        trainer.kill(signum)
        code = trainer.wait()
        slowest = max(slowest, time.monotonic() - begun)
        saved += code == 128 + signum
        lost += len(rows_of(directory)) - newest(directory)
    assert forge.train(config, fault=LEAVE).wait() == 0
    same = curve(directory) == curve(whole)
    figure = (
        f"{saved} of {times} saved and exited with 130 or 143, {lost} steps lost, slowest {slowest:.1f} s, "
        f"curve {'the same' if same else 'ANOTHER'}"
    )
    return Row("A3", "SIGTERM and SIGINT", figure, saved == times and not lost and same and slowest <= patience)


def storm(ground, restarts):
    """A4: every start is killed before its first checkpoint."""
    config, directory = ground.config("a4", steps=8, every=4), ground.path / "a4"
    fault = {"do": "kill", "at": "llmtune.training.meter:Meter.row", "nth": 2}
    command = [sys.executable, "-m", "tests.reliability.faults", json.dumps(fault)]
    said, told = [], io.StringIO()
    with contextlib.redirect_stderr(told):
        supervisor = Supervisor([str(config)], directory, restarts=restarts, say=said.append, command=command)
        code = supervisor.run(Stop())
    ok = code == exit_codes.GAVE_UP and told.getvalue().count("\n") == 1 and len(said) == restarts
    return Row("A4", "a kill storm", f"given up after {len(said) + 1} starts, in one line, with code {code}", ok)
