"""B: bytes of the newest step change on disk; what is restored afterwards is right, or nothing is."""

import collections
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from llmtune import exit_codes
from llmtune.errors import LlmtuneError
from llmtune.training.checkpoint.checkpoints import Checkpoints, flatten
from llmtune.training.checkpoint.retention import Retention
from llmtune.training.state import TrainState
from tests.reliability.kills import LEAVE
from tests.reliability.tiny import Row, curve, state_hash

KINDS = (
    "bit flip",
    "zeroed block",
    "truncated",
    "emptied",
    "deleted",
    "appended",
    "two files swapped",
    "other step's file",
)

NO_RIGHT = {  # what is taken away from whom
    "run": (".", 0o500),
    "checkpoints": ("checkpoints", 0o500),
    "step": ("checkpoints/4", 0o000),
    "arrays": ("checkpoints/4/state", 0o000),
}


def state(step):
    random = np.random.default_rng(step)
    shapes = {"q": (2, 64, 64), "up": (2, 64, 128), "norm": (64,)}
    weights = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    moments = {name: own.astype(jnp.bfloat16) for name, own in weights.items()}
    return TrainState(jnp.int32(step), weights, (moments, jnp.int32(step)))


def checkpoints(folder):
    return Checkpoints(folder, Retention(5), {"data": "d", "base": "b"}, 1, lambda line: None)


def damage(kind, step, other, random):
    """One mutation of one file, or of two."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    file = files[random.integers(len(files))]
    content = bytearray(file.read_bytes())
    at = int(random.integers(max(len(content), 1)))
    if kind == "bit flip" and content:
        content[at] ^= 1 << int(random.integers(8))
    elif kind == "zeroed block":
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    elif kind == "truncated":
        del content[at:]
    elif kind == "emptied":
        content.clear()
    elif kind == "appended":
        content += random.bytes(16)
    elif kind == "deleted":
        return file.unlink()
    elif kind == "two files swapped":
        second = files[random.integers(len(files))]
        file.write_bytes(second.read_bytes())
        return second.write_bytes(content)
    elif kind == "other step's file":
        theirs = sorted(path for path in other.rglob("*") if path.is_file())
        content = theirs[random.integers(len(theirs))].read_bytes()
    file.write_bytes(content)


def corrupt(folder, mutations, mesh):
    """B1."""
    good = folder / "good"
    with checkpoints(good) as own:
        for step in (1, 2):
            own.save(step, state(step))
    random, found, by_kind = np.random.default_rng(mutations), collections.Counter(), collections.Counter()
    for number in range(mutations):
        kind, tried = KINDS[number % len(KINDS)], folder / "tried"
        shutil.copytree(good, tried)
        damage(kind, tried / "2", tried / "1", random)
        outcome = restore(tried, mesh)
        found[outcome] += 1
        by_kind[kind] += outcome != "silent"
        shutil.rmtree(tried)
    ok = found["detected"] + found["harmless"] == mutations
    figure = f"{found['detected']} detected, {found['harmless']} harmless, {found['silent']} silent, of {mutations}"
    return Row("B1", "corruption: " + ", ".join(KINDS), figure, ok)


def restore(folder, mesh):
    try:
        with checkpoints(folder) as own:
            restored = own.restore(state(0), mesh)
    except LlmtuneError:
        return "silent"  # step 1 is good: to refuse it is an error too
    expected = flatten(state(int(restored.step)))
    same = all(np.array_equal(own, expected[name]) for name, own in flatten(restored).items())
    return "silent" if not same else "detected" if int(restored.step) == 1 else "harmless"


def all_bad(folder, mesh):
    """B2: with every step damaged, a run is refused, each time."""
    with checkpoints(folder / "bad") as own:
        for step in (1, 2, 3):
            own.save(step, state(step))
    random, refused = np.random.default_rng(0), 0
    for step in (1, 2, 3):
        damage("deleted", folder / f"bad/{step}", folder / "bad/1", random)
    for _ in range(3):
        try:
            with checkpoints(folder / "bad") as own:
                own.restore(state(0), mesh)
        except LlmtuneError:
            refused += 1
    return Row("B2", "every step damaged", f"refused {refused} of 3 times; never begun anew", refused == 3)


def no_permission(forge, ground, places=NO_RIGHT):
    """B2: no right to write, or to read. A line and a code; once the right is back, the run goes on where it was."""
    whole = ground.path / "b2-whole"
    assert forge.train(ground.config("b2-whole", steps=8, every=2, keep=9), fault=LEAVE).wait() == 0
    found, shown = {}, {}
    for name, (place, mode) in places.items():
        directory = ground.path / f"b2-{name}"
        assert forge.train(ground.config(f"b2-{name}", steps=4, every=2, keep=9), fault=LEAVE).wait() == 0
        config = ground.config(f"b2-{name}", steps=8, every=2, keep=9)
        (directory / "config.yaml").write_text((whole / "config.yaml").read_text().replace("b2-whole", f"b2-{name}"))
        own = directory / place
        before = own.stat().st_mode
        own.chmod(mode)
        trainer = forge.train(config, fault=[{"do": "drop"}, LEAVE])
        code = trainer.wait()
        errors = [line for line in trainer.said.splitlines() if line.startswith("llmtune: error:")]
        own.chmod(before)
        again = forge.train(config, fault=LEAVE)
        went_on = again.wait() == 0 and "resuming after step 4" in again.said
        same = (curve(directory), state_hash(directory)) == (curve(whole), state_hash(whole))
        found[name] = code in (exit_codes.USAGE, exit_codes.RETRY) and len(errors) == 1 and went_on and same
        shown[name] = (code, errors, went_on, same, trainer.said[-1500:] if not errors else "")
    good = sum(found.values())
    figure = f"{good} of {len(found)} refused in one line; with the right back all go on to the same curve and state"
    ok = good == len(found)
    return Row(
        "B2",
        "no right to write the run or its checkpoints, or to read a step or its arrays",
        figure if ok else f"{shown}",
        ok,
    )


def across_meshes(folder, meshes):
    """D1: what one mesh saved every other restores with the same digests; `restore` compares them."""
    right, tried = 0, 0
    for number, saved in enumerate(meshes):
        with jax.set_mesh(saved), checkpoints(folder / f"mesh-{number}") as own:
            own.save(1, spread(state(1), saved))
        for other in meshes:
            tried += 1
            with jax.set_mesh(other), checkpoints(folder / f"mesh-{number}") as own:
                restored = own.restore(spread(state(0), other), other)
            expected = flatten(state(1))
            right += all(np.array_equal(leaf, expected[name]) for name, leaf in flatten(restored).items())
    return Row(
        "D1",
        f"{len(meshes)} meshes to one another",
        f"{right} of {tried} restored bit by bit, digests equal",
        right == tried,
    )


def spread(own, mesh):
    spec = jax.sharding.PartitionSpec
    layouts = {3: spec(None, "fsdp", "tensor"), 1: spec("fsdp"), 0: spec()}
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, layouts[leaf.ndim])), own)
