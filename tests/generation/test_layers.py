"""The copy of the weights that decoding on a CPU reads: made once, never stale, gone with the weights."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np

import llmtune
from llmtune.generation import layers
from tests.conftest import ROOT
from tests.parity.reference import save_model
from tests.runs import run_config, write_rows

PROMPTS = [[1, 17, 29, 5], [1, 44]]


def test_other_weights_are_decoded_with_and_none_outlive_their_model(tmp_path):
    save_model("gqa untied", tmp_path)
    model = llmtune.load(tmp_path)
    other = dataclasses.replace(model, params=jax.tree.map(lambda own: own[..., ::-1] * 0.7, model.params))
    generate = lambda own: own.generate(PROMPTS, max_new_tokens=40)  # noqa: E731
    first, second = generate(model), generate(other)
    kept = layers._kept_layers_apart.last
    assert first != second and kept is not None
    assert generate(other) == second and layers._kept_layers_apart.last is kept
    assert generate(model) == first == generate(llmtune.load(tmp_path))
    layers._kept_layers_apart.last = None
    assert generate(other) == second
    watched = weakref.ref(jax.tree.leaves(generate_last(model))[0])
    del model, other, kept
    gc.collect()
    assert watched() is None and layers._kept_layers_apart.last is None


def generate_last(model):
    """The copy, made of this model."""
    model.generate(PROMPTS, max_new_tokens=2)
    kept = layers._kept_layers_apart.last
    assert kept is not None
    return kept[2]


def test_it_is_made_anew_where_one_array_alone_is_another_or_stands_elsewhere():
    made = []
    kept = layers._Kept(lambda tree: made.append(tree) or len(made))
    one, two = {"a": jnp.ones(3), "b": jnp.ones(2)}, {"b": jnp.ones(2)}
    assert [kept(one), kept(one), kept({**one}), kept({**one, **two}), kept(one)] == [1, 1, 1, 2, 3]
    assert [kept({"a": one["a"]}), kept({"c": one["a"]})] == [4, 5]
    changing = {"a": np.ones(3)}
    assert [kept(changing), kept(changing)] == [6, 7]


def test_a_run_that_samples_keeps_no_copy(stories, batches, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    sections = {"train": {"steps": 2, "batch_size": 4, "dtype": "float32"}, "evaluate": {"prompts": ["Once"]}}
    layers._kept_layers_apart.last = None
    llmtune.train(run_config(tmp_path, stories, data, **sections), devices=jax.devices()[:1])
    assert layers._kept_layers_apart.last is None
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["after"]["samples"][0]["completion"]


FREED = """
import jax, jax.numpy as jnp, numpy as np
from llmtune.freed_memory import give_back_freed_memory
from llmtune.training.meter import memory_in_use

start = jnp.asarray(np.zeros(25_000, np.float32))
before = memory_in_use()["host_bytes"]
held = [start + n for n in range(2000)]
jax.block_until_ready(held)
full = memory_in_use()["host_bytes"]
del held[:-1]
give_back_freed_memory()
print(full - before, memory_in_use()["host_bytes"] - before)
"""


def test_what_was_freed_goes_back_to_the_system():
    """Buffers of 100 KB, which malloc keeps, and a last one that stands in the way of its giving back their end.

    In a process of its own, which has nothing free to begin with.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    said = subprocess.run([sys.executable, "-c", FREED], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    full, after = map(int, said.stdout.split())
    assert full > 150e6 and after < 60e6
