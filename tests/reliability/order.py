"""E: what a run sees, and what comes out, is a function of its configuration alone."""

import numpy as np

from llmtune.data.batches import BatchSource
from llmtune.data.dataset import Counts, Dataset
from tests.reliability.kills import LEAVE
from tests.reliability.tiny import Row, curve, state_hash

READING = "llmtune.data.batches:READ_AHEAD"


def same_rows(resumes):
    """E1: 3 epochs, resumed at random steps by 1, 2 or 4 hosts, packed or not: the same batches."""
    random, right = np.random.default_rng(0), 0
    for number in range(resumes):
        packing = bool(number % 2)
        whole = source(packing, 40)
        step, hosts = int(random.integers(40)), (1, 2, 4)[number % 3]
        parts = [source(packing, 40, host, hosts)[step] for host in range(hosts)]
        right += all(
            np.array_equal(np.concatenate([part[name] for part in parts]), rows) for name, rows in whole[step].items()
        )
    seen = [source(False, 75)[step]["tokens"][:, 1] for step in range(75)]  # 3 epochs of 100 rows in batches of 4
    counts = np.bincount(np.concatenate(seen), minlength=100)
    once = bool((counts == 3).all())
    came = "3 times" if once else "NOT 3 times"
    figure = f"{right} of {resumes} resumes see the same rows; in 3 epochs each example came {came}"
    return Row("E1", "data order over resumes, hosts and packing", figure, right == resumes and once)


def source(packing, steps, process=0, processes=1):
    """100 examples; the second token of example i is i."""
    lengths = np.random.default_rng(2).integers(8, 33, 100)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.full(offsets[-1], 7, np.int32)
    ids[offsets[:-1] + 1] = np.arange(100)
    share = range(process * 4 // processes, (process + 1) * 4 // processes)  # of the four rows of a batch
    return BatchSource(make_dataset(ids, offsets), 4, 32, 9, packing, True, steps, share)


def make_dataset(ids, offsets):
    return Dataset(ids, ids.copy(), offsets, Counts())


def same_curve(forge, ground, steps):
    """E2: twice, and with other saves, evaluations, traces, and threads that read ahead."""
    variants = {
        "plain": {},
        "again": {},
        "saved each step": {"every": 1},
        "read otherwise": {
            "fault": {"do": "set", "at": READING, "value": {"num_threads": 1, "prefetch_buffer_size": 1}}
        },
        "logged elsewhere": {"flags": ["--profile", "3:4"]},
        "evaluated": {"evaluate": {"every": 3}, "data": {"validation": str(ground.path / "rows.jsonl")}},
    }
    found = {}
    for number, (name, sections) in enumerate(variants.items()):
        options = {"every": 10**6, **sections}
        fault, flags = options.pop("fault", None), options.pop("flags", [])
        config = ground.config(f"e2-{number}", steps=steps, **options)
        code = forge.train(config, *flags, fault=[LEAVE] if fault is None else [fault, LEAVE]).wait()
        directory = ground.path / f"e2-{number}"
        found[name] = (code, curve(directory), state_hash(directory))
    different = [name for name, own in found.items() if own != found["plain"]]
    figure = f"{len(variants)} runs of {steps} steps, {len(different)} of another curve or state {' '.join(different)}".strip()
    return Row(
        "E2",
        "the same twice; with other saves, evaluations, traces, reading ahead",
        figure,
        not different and found["plain"][0] == 0,
    )
