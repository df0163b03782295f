"""Thousands of damaged headers and indexes: our own error or a sound reading, at once and in little memory (all: nightly)."""

import json
import os
import random
import resource
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from checkpoints_convert.hf_config import read_model_config
from checkpoints_convert.hf_weights import check_tensors
from checkpoints_convert.safetensors_reader import INDEX, SINGLE, open_directory
from llmtune.errors import LlmtuneFormatError
from tests.parity.reference import save_model

SLOWEST = 0.1  # seconds
GROWTH = 200e6  # bytes of resident memory
VALUES = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1.5, 1e308, "", "F32", "BF16", "F8", "\x00", "../../etc/passwd",
    "\ud800", "x" * 10_000, [], {}, [[]] * 50, [2**62] * 40, [1] * 3000, {"a": {"a": {"a": {}}}}, "model.safetensors",
]  # fmt: skip
SNIPPETS = [
    b"{", b"}", b"[" * 2000, b'"', b"\\u0000", b"\xff", b"NaN", b"Infinity", b"1e999", b"9" * 5000, b",", b":", b"null", b"\0",
]  # fmt: skip
AMOUNTS = [pytest.param(0.06, id="a share"), pytest.param(1.0, id="all", marks=pytest.mark.nightly)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in three shards and a single file, both small."""
    root = tmp_path_factory.mktemp("mutations")
    save_model("tied", root / "sharded", max_shard_size="90KB", num_hidden_layers=2)
    save_model("tied", root / "single", num_hidden_layers=2)
    return root


def mutated_json(draw: random.Random, value):
    """One place of a tree changed: replaced, removed, doubled, renamed."""
    places = [()]

    def walk(tree, path):
        for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
            places.append((*path, key))
            walk(tree[key], (*path, key))

    walk(value, ())
    value = json.loads(json.dumps(value))
    path = draw.choice(places)
    if not path:
        return draw.choice(VALUES)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kind = draw.randrange(4)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["", "x", "\n", "a\x1b[2J", "__metadata__", path[-1] + " "])] = parent.pop(path[-1])
    elif kind == 2 and isinstance(parent[path[-1]], int):
        parent[path[-1]] += draw.choice([-1, 1, 8, 2**32, -(2**40)])
    else:
        parent[path[-1]] = draw.choice(VALUES)
    return value


def mutated_bytes(draw: random.Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del data[at : at + draw.choice([1, 10, 1000])]
        elif kind == 2:
            data[at:at] = draw.choice(SNIPPETS)
        else:
            data[at:at] = data[at : at + 50]
    return bytes(data)


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def survive(directory, write, count):
    """Every damage is refused in one bounded line, or makes no difference to what is described."""
    refused, slowest, before, odd = 0, 0.0, memory(), []
    for number in range(count):
        write(random.Random(number))
        began = time.thread_time()
        try:
            open_directory(directory)
        except LlmtuneFormatError as error:
            refused += 1
            text = str(error)
            if not text.isprintable() or len(text) > 1000:
                odd.append((number, text[:200]))
        slowest = max(slowest, time.thread_time() - began)
    assert not odd
    assert slowest < SLOWEST and memory() - before < GROWTH
    return refused / count


@pytest.mark.parametrize("share", AMOUNTS)
def test_mutated_headers(share, model):
    path = model / "single" / SINGLE
    sound = path.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    text, data = sound[8 : 8 + length], sound[8 + length :]
    header = json.loads(text)

    def write(draw):
        kind, size, body = draw.randrange(4), length, data
        if kind < 2:
            new = json.dumps(mutated_json(draw, header)).encode("utf-8", "replace")
            size = len(new)
        elif kind == 2:
            new = mutated_bytes(draw, text)
            size = len(new)
        else:
            new, size = text, draw.choice([0, 1, 7, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
            body = data[: draw.randrange(len(data))] if draw.randrange(2) else data + b"\0" * draw.randrange(1, 9)
        path.write_bytes(size.to_bytes(8, "little") + new + body)

    assert survive(model / "single", write, int(10_000 * share)) > 0.9
    path.write_bytes(sound)
    open_directory(model / "single")


@pytest.mark.parametrize("share", AMOUNTS)
def test_mutated_indexes(share, model):
    path = model / "sharded" / INDEX
    sound = path.read_bytes()
    index = json.loads(sound)

    def write(draw):
        changed = draw.randrange(3) and json.dumps(mutated_json(draw, index)).encode("utf-8", "replace")
        path.write_bytes(changed or mutated_bytes(draw, sound))

    assert survive(model / "sharded", write, int(1_000 * share)) > 0.5
    path.write_bytes(sound)
    open_directory(model / "sharded")


def test_names_that_lead_elsewhere_are_refused_before_any_file_is_opened(tmp_path, refusal):
    """Python tells its audit hooks of every open."""
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file({"x": np.ones(3, np.float32)}, outside / "weights")
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "link").symlink_to(outside / "weights")
    os.mkfifo(inside / "fifo")
    names = [
        "../outside/weights",
        str(outside / "weights"),
        "link",
        "fifo",
        "a\0b",
        "../outside",
        "sub/../link",
        "C:\\x",
        "\ud800",
    ]
    opened = []
    watching = [True]
    sys.addaudithook(
        lambda event, arguments: opened.append(str(arguments[0])) if watching[0] and event == "open" else None
    )
    try:
        for name in names:
            (inside / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
            opened.clear()
            refusal(inside, open_directory, inside)
            assert {path for path in opened if str(tmp_path) in path} <= {str(inside / INDEX)}, name
    finally:
        watching[0] = False


CHANGES = {
    "deleted": lambda stored, name: stored.pop(name),
    "renamed": lambda stored, name: stored.update({f"{name}_": stored.pop(name)}),
    "reshaped": lambda stored, name: stored.update({name: stored[name].reshape(1, -1)}),
    "shorter": lambda stored, name: stored.update({name: stored[name][:-1].copy()}),
    "of integers": lambda stored, name: stored.update({name: stored[name].view(np.int16)}),
    "of the other half precision": lambda stored, name: stored.update({name: stored[name].view(np.float16)}),
    "of doubles": lambda stored, name: stored.update({name: stored[name].astype(np.float64)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_single_tensor_that_is_changed_is_named(change, tmp_path, refusal):
    directory = save_model("gqa untied", tmp_path / "hf", dtype=torch.bfloat16)
    config, whole = read_model_config(directory), load_file(directory / SINGLE)
    for name in whole:
        stored = dict(whole)
        change(stored, name)
        save_file(stored, directory / SINGLE)
        assert name in refusal(directory, check_tensors, open_directory(directory), config)
