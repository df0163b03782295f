"""The example of docs/transforms.md is run as it stands there: it merges, trains, and lies where it should."""

import re
from dataclasses import dataclass
from typing import ClassVar, final

import jax
import numpy as np

from llmtune.config.adapt import METHODS
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.sharding import load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.transforms import Transform, merge, partition, select, weights_by_path
from llmtune.transforms.low_rank import wrap
from llmtune.weights import Adapter, ArraySpec, Weight, constant, dense, linear, materialize, shardings
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "transforms.md").read_text(encoding="utf-8")
GIVEN = {
    "jax": jax, "dataclass": dataclass, "ClassVar": ClassVar, "final": final, "Adapter": Adapter, "Weight": Weight,
    "linear": linear, "dense": dense, "ArraySpec": ArraySpec, "constant": constant, "weights_by_path": weights_by_path,
    "select": select, "Transform": Transform, "wrap": wrap,
}  # fmt: skip


def test_the_new_method_of_the_page_works_as_it_stands():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 20
    names = dict(GIVEN)
    exec(code, names)
    _, declared = declare(ModelConfig("LlamaForCausalLM", 64, 32, 48, 3, 4, 2, 8))
    mesh, strategy = make_mesh({"fsdp": 8}), load_strategy("fsdp", configs_directory() / "strategies")
    transform = names["gain"](["q_proj", "down_proj"])
    base = materialize(declared, jax.random.key(0), mesh, strategy)
    params = transform.apply(base, materialize(transform.init(declared), jax.random.key(0), mesh, strategy))
    trainable, _ = partition(params, transform.trains)
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [(3,), (3,)]
    expected = shardings(transform.apply(declared, transform.init(declared)), mesh, strategy)
    jax.tree.map(lambda array, layout: array.sharding.is_equivalent_to(layout, array.ndim) or 1 / 0, params, expected)
    with jax.set_mesh(mesh), strategy.active():
        jax.tree.map(np.testing.assert_array_equal, merge(params), base)


def test_the_pages_name_every_method():
    pages = PAGE + (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert set(METHODS) <= set(re.findall(r"^\| `(\w+)`", pages, re.MULTILINE))
