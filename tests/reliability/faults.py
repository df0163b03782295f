"""What is broken on purpose, at the nth call of a function of llmtune.

{"do": "kill", "at": "module:function", "nth": 2, "after": true}     kill -9, before or after that call
{"do": "leave", "at": ...}                                           exit with 0
{"do": "block", "at": ...}                                           never return
{"do": "full", "at": ..., "until": "module:function"}                files may not grow beyond 64 KiB, until the other is called
{"do": "fail", "at": ...}                                            OSError, no space left on device
{"do": "tell", "at": ...}                                            an unknown error, with a secret in its text
{"do": "drop"}                                                       at once: root is asked for permissions as others are
{"do": "set", "at": "module:name", "value": {...}}                   at once: a record with other fields
[..., ...]                                                           several of them
"""

import ctypes
import errno
import functools
import importlib
import json
import os
import resource
import signal
import sys
import time

FULL = 64 * 1024
COMMIT, CHECKPOINTS = "llmtune.training.checkpoint.commit", "llmtune.training.checkpoint.checkpoints"
STEPS = "llmtune.training.checkpoint.steps"
COMMIT_POINTS = {  # every stroke of a commit, and of the removal of an old step
    "before anything is written": {"at": f"{COMMIT}:start_writing", "nth": 2},
    "while arrays are written": {"at": f"{COMMIT}:start_writing", "nth": 2, "after": True},
    "before files are hashed": {"at": f"{COMMIT}:describe_files", "nth": 2},
    "before the manifest": {"at": f"{COMMIT}:describe_files", "nth": 2, "after": True},
    "after the manifest": {"at": f"{COMMIT}:make_durable", "nth": 2},
    "after fsync, before the rename": {"at": f"{COMMIT}:make_durable", "nth": 2, "after": True},
    "after the rename": {"at": f"{COMMIT}:sync", "nth": 2},
    "after the rename is durable": {"at": f"{COMMIT}:sync", "nth": 2, "after": True},
    "before an old step goes": {"at": f"{STEPS}:remove_step", "nth": 1},
    "while an old step goes": {"at": f"{STEPS}:shutil.rmtree", "nth": 2},
    "after an old step went": {"at": f"{STEPS}:remove_step", "nth": 1, "after": True},
}


def install(fault):
    if fault is None:
        return
    if isinstance(fault, list):
        for own in fault:
            install(own)
        return
    if fault["do"] in AT_ONCE:
        return AT_ONCE[fault["do"]](fault)
    holder, name = find(fault["at"])
    own, calls = getattr(holder, name), [0]

    @functools.wraps(own)
    def broken(*arguments, **options):
        calls[0] += 1
        hit = calls[0] == fault.get("nth", 1)
        if hit and not fault.get("after"):
            DOES[fault["do"]](fault)
        result = own(*arguments, **options)
        if hit and fault.get("after"):
            DOES[fault["do"]](fault)
        return result

    setattr(holder, name, broken)


def find(place):
    """`module:Class.function` -> (what holds it, its name)."""
    module, _, path = place.partition(":")
    holder = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        holder = getattr(holder, part)
    return holder, name


def kill(fault):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def leave(fault):
    os._exit(0)


def block_for_ever(fault):
    print(f"blocked at {time.monotonic()}", flush=True)  # one clock for all processes
    while True:
        time.sleep(60)


def fill(fault):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, hard))
    if "until" in fault:
        holder, name = find(fault["until"])
        own = getattr(holder, name)

        def freed(*arguments, **options):
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            return own(*arguments, **options)

        setattr(holder, name, freed)


def fail(fault):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tell(fault):
    raise RuntimeError(f"with {os.environ['CANARY_TOKEN']} in hand")


def drop(fault):
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root passes every permission."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for low in range(3):  # effective, permitted, inheritable; the first three words are capabilities 0 to 31
        sets[low] &= ~0b110
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def put(fault):
    holder, name = find(fault["at"])
    setattr(holder, name, type(getattr(holder, name))(**fault["value"]))


AT_ONCE = {"drop": drop, "set": put}
DOES = {"kill": kill, "leave": leave, "block": block_for_ever, "full": fill, "fail": fail, "tell": tell}


if __name__ == "__main__":
    install(json.loads(sys.argv[1]))
    from llmtune.cli import main

    sys.exit(main(["train", *sys.argv[2:]]))
