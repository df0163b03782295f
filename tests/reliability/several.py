"""D: several processes of one run: one is killed, stopped, or asked to stop; another number of them goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from llmtune import exit_codes
from tests.conftest import ROOT
from tests.reliability.faults import COMMIT
from tests.reliability.forge import ENVIRONMENT
from tests.reliability.kills import LEAVE
from tests.reliability.tiny import Row, curve, newest, rows_of, state_hash


def start(forge, config, *flags, processes=2, faults=(LEAVE, LEAVE)):
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    if processes == 1:
        return [forge.train(config, *flags, fault=LEAVE)]
    return [
        forge.train(config, *flags, "--processes", processes, "--process", index, "--coordinator", address, fault=own)
        for index, own in zip(range(processes), faults, strict=False)
    ]


def train(forge, config, *flags, processes=2):
    trainers = start(forge, config, *flags, processes=processes)
    return [trainer.wait() for trainer in trainers], "".join(trainer.said for trainer in trainers)


def until_step(trainers, directory, step):
    while len(rows_of(directory)) < step and all(trainer.poll() is None for trainer in trainers):
        time.sleep(0.005)


def lose_one(forge, ground, ways, steps=12, patience=15):
    """D2: (which process, which signal), one after the other in one run; the others end in time, with 75 and a line."""
    codes, said = train(forge, ground.config("d2-whole", steps=steps))
    assert codes == [0, 0], said
    config, directory = ground.config("d2", steps=steps), ground.path / "d2"
    noticed, slowest, told = 0, 0.0, 0
    for number, (index, signum) in enumerate(ways):
        trainers = start(forge, config, "--safeguards.heartbeat_seconds", "5")
        until_step(trainers, directory, 1 + number * (steps - 2) // len(ways))
        begun = time.monotonic()
        trainers[index].kill(signum)
        other = trainers[1 - index]
        code = other.wait(60)
        slowest = max(slowest, time.monotonic() - begun)
        noticed += code == exit_codes.RETRY
        told += f"process {index} of 2 is lost" in other.said
        if signum == signal.SIGSTOP:
            trainers[index].kill(signal.SIGKILL)
        trainers[index].wait()
    codes, said = train(forge, config)
    same = (curve(directory), state_hash(directory)) == (
        curve(ground.path / "d2-whole"),
        state_hash(ground.path / "d2-whole"),
    )
    figure = (
        f"{noticed} of {len(ways)} losses noticed with code 75, {told} with a line, slowest {slowest:.1f} s "
        f"at a heartbeat of 5 s; curve and state {'the same' if same else 'OTHERS'}"
    )
    ok = noticed == told == len(ways) and slowest <= patience and codes == [0, 0] and same
    return Row("D2", "2 processes: worker or coordinator killed, or stopped", figure, ok)


def ask_one(forge, ground, steps=12):
    """A3, two processes: SIGTERM to one of them; both save the same step."""
    config, directory = ground.config("a3-two", steps=steps, every=1000), ground.path / "a3-two"
    trainers = start(forge, config)
    until_step(trainers, directory, 3)
    trainers[1].kill(signal.SIGTERM)
    codes = [trainer.wait() for trainer in trainers]
    saved, done = newest(directory), len(rows_of(directory))
    again, _ = train(forge, config)
    ok = codes == [143, 143] and saved == done > 0 and again == [0, 0] and len(curve(directory)) == steps
    return Row("A3", "SIGTERM to one of 2 processes", f"codes {codes}, both saved step {saved} of {done} done", ok)


def fail_in_one(forge, ground):
    """C1, two processes: the disk is full for one. At the commit they go on in place; while arrays are written both end."""
    assert train(forge, ground.config("c1-two", steps=8, keep=9))[0] == [0, 0]
    whole = ground.path / "c1-two"
    first = {"do": "fail", "at": f"{COMMIT}:make_durable", "nth": 2}
    second = {"do": "fail", "at": f"{COMMIT}:start_writing", "nth": 2}
    found = {}
    for name, faults in {"commit": [[first, LEAVE], LEAVE], "write": [LEAVE, [second, LEAVE]]}.items():
        config, directory = ground.config(f"c1-{name}", steps=8, keep=9), ground.path / f"c1-{name}"
        trainers = start(forge, config, faults=faults)
        codes = [trainer.wait(120) for trainer in trainers]
        told = sum(trainer.said.count("failed (no space left on device)") for trainer in trainers)
        kept = {path.name for path in directory.glob("checkpoints/*")}
        if name == "write":
            assert train(forge, config)[0] == [0, 0]
        same = (curve(directory), state_hash(directory)) == (curve(whole), state_hash(whole))
        found[name] = (codes, told, kept >= {"2"} and all(own.isdecimal() for own in kept), same)
    codes = [own[0] for own in found.values()]
    figure = (
        f"at the commit the run goes on in place and saves again (codes {codes[0]}), in the middle of the arrays both end "
        f"(codes {codes[1]}) and go on; told in one line, curve and state the same"
    )
    ok = codes == [[0, 0], 2 * [exit_codes.RETRY]] and all(
        told == 1 and kept and same for _, told, kept, same in found.values()
    )
    return Row("C1", "a save that fails in one of 2 processes", figure if ok else f"{found}", ok)


def elastic(forge, ground, layout=(2, 1, 2), steps=18):
    """D2: each third of the run by another number of processes."""
    assert train(forge, ground.config("e-whole", steps=steps, every=1))[0] == [0, 0]
    config, directory = ground.config("e", steps=steps, every=1), ground.path / "e"
    for number, processes in enumerate(layout[:-1], 1):
        trainers = start(forge, config, processes=processes)
        until_step(trainers, directory, number * steps // len(layout))
        trainers[0].kill(signal.SIGTERM)
        assert {trainer.wait() for trainer in trainers} == {143}
    assert set(train(forge, config, processes=layout[-1])[0]) == {0}
    whole, parts = (np.array(curve(ground.path / name)) for name in ("e-whole", "e"))
    worst = float(np.max(np.abs(parts - whole) / np.abs(whole))) if whole.shape == parts.shape else float("inf")
    figure = f"{' -> '.join(map(str, layout))} processes over {steps} steps: largest relative difference {worst:.1e}"
    return Row("D2", "another number of processes", figure, worst <= 1e-5)


def supervised(ground, kills=(1, 0, 1), steps=40):
    """D2: `--supervise --processes 2`; each of these processes in turn is killed, in the middle of its part of the run."""
    whole, directory = ground.path / "s-whole", ground.path / "s"
    command = [sys.executable, "-m", "llmtune.cli", "train"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    flags = ["--supervise", "--processes", "2"]
    reference = [*command, str(ground.config("s-whole", steps=steps, every=5)), *flags]
    assert subprocess.run(reference, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    started = [*command, str(ground.config("s", steps=steps, every=5)), *flags]
    parent = subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for number, index in enumerate(kills, 1):
        while len(rows_of(directory)) < number * steps // (len(kills) + 1):
            time.sleep(0.005)
        os.kill(children(parent.pid)[index], signal.SIGKILL)
        while index in children(parent.pid) and len(children(parent.pid)) == 2:
            time.sleep(0.005)
        time.sleep(1.0)
    said, _ = parent.communicate()
    same = (curve(directory), state_hash(directory)) == (curve(whole), state_hash(whole))
    found = json.loads((directory / "run.json").read_text())["supervised"]
    killed = ", ".join("worker" if index else "coordinator" for index in kills)
    figure = (
        f"{found['restarts']} restarts after kills of {killed}: curve and state {'bit-identical' if same else 'OTHERS'}; "
        f"goodput {found['goodput']:.1%} printed"
    )
    ok = parent.returncode == 0 and same and found["restarts"] == len(kills) and "goodput: " in said
    return Row("D2", "supervised run of 2 processes", figure, ok)


def children(parent):
    """The processes of a run that a supervisor started and that still live, by their index."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if "--process" in words:
            found[int(words[words.index("--process") + 1])] = int(pid)
    return found
