"""Rows that travel: where they arrive, that they come back, and that gradients take the way back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmtune.kernels import exchange_rows
from llmtune.sharding import make_mesh

DEVICES, ROWS, WIDTH = 4, 12, 3
COUNTS = {
    "uneven": [[3, 0, 4, 5], [12, 0, 0, 0], [1, 2, 3, 6], [0, 0, 0, 12]],
    "all to one": [[0, 12, 0, 0]] * 4,
    "not all rows": [[1, 1, 1, 1], [0, 0, 0, 0], [2, 3, 0, 1], [0, 5, 0, 0]],
}


@pytest.fixture(params=list(COUNTS))
def counts(request):
    return np.array(COUNTS[request.param], np.int32)


def run(rows, counts, way_back, size):
    """[devices, size, width] of what each device receives."""

    def own(rows, counts):
        return exchange_rows(rows[0], counts.T if way_back else counts, "expert", size)[None]

    split, whole = PartitionSpec("expert"), PartitionSpec()
    return jax.jit(jax.shard_map(own, in_specs=(split, whole), out_specs=split, check_vma=False))(rows, counts)


def test_rows_arrive_by_sender_and_come_back(counts):
    mesh = make_mesh({"expert": DEVICES}, jax.devices()[:DEVICES])
    rows = np.random.default_rng(0).standard_normal((DEVICES, ROWS, WIDTH)).astype(np.float32)
    starts = np.cumsum(counts, 1) - counts
    expected = np.zeros((DEVICES, DEVICES * ROWS, WIDTH), np.float32)
    for to in range(DEVICES):
        arrived = [rows[of, starts[of, to] : starts[of, to] + counts[of, to]] for of in range(DEVICES)]
        expected[to, : counts[:, to].sum()] = np.concatenate(arrived)
    with jax.set_mesh(mesh):
        placed = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("expert")))
        there = run(placed, counts, False, DEVICES * ROWS)
        back = run(there, counts, True, ROWS)
        weights = jnp.arange(there.size, dtype=jnp.float32).reshape(there.shape)
        weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec("expert")))
        gradient = jax.jit(jax.grad(lambda rows: (run(rows, counts, False, DEVICES * ROWS) * weights).sum()))(placed)
        returned = run(weights, counts, True, ROWS)
    there, back, gradient, returned = (np.asarray(array) for array in (there, back, gradient, returned))
    np.testing.assert_array_equal(there, expected)
    for device in range(DEVICES):
        sent = counts[device].sum()
        np.testing.assert_array_equal(back[device, :sent], rows[device, :sent])
        np.testing.assert_array_equal(gradient[device, :sent], returned[device, :sent])
        assert not np.any(gradient[device, sent:])


def test_one_collective_where_the_platform_has_it(monkeypatch):
    monkeypatch.setattr("llmtune.kernels.row_exchange.platform", lambda: "tpu")
    mesh = make_mesh({"expert": DEVICES}, jax.devices()[:DEVICES])
    with jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct(
            (DEVICES, ROWS, WIDTH), "float32", sharding=NamedSharding(mesh, PartitionSpec("expert"))
        )
        traced = jax.make_jaxpr(functools.partial(run, way_back=False, size=8))(rows, jnp.ones((4, 4), jnp.int32))
    assert str(traced).count("ragged_all_to_all[") == 1 and "all_gather[" not in str(traced)
