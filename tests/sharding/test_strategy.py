"""Strategy tables and meshes: what they say, and what they refuse."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from llmtune.sharding import ShardingError, Strategy, default_mesh, load_strategy, make_mesh, sharding_for
from llmtune.shipped import configs_directory


def test_spec_follows_the_table():
    strategy = Strategy("s", {"embed": ("fsdp",), "mlp": ("tensor",), "both": ("fsdp", "tensor")})
    assert strategy.spec("layers", "embed", "mlp") == P(None, "fsdp", "tensor")
    assert strategy.spec("both", None) == P(("fsdp", "tensor"), None)


def test_one_mesh_axis_twice_in_a_tensor_is_refused():
    with pytest.raises(ShardingError, match="same mesh axis twice"):
        Strategy("s", {"embed": ("fsdp",), "mlp": ("fsdp",)}).spec("embed", "mlp")


@pytest.mark.parametrize("name", ["expert", "fsdp", "tensor"])
def test_shipped_strategies_load(name):
    assert load_strategy(name, configs_directory() / "strategies").gather == ("fsdp",)


def test_unknown_strategy_lists_the_known():
    with pytest.raises(ShardingError, match="known: expert, fsdp, tensor"):
        load_strategy("zero9", configs_directory() / "strategies")


def test_mesh_sizes():
    assert dict(make_mesh({"fsdp": -1, "tensor": 2}).shape) == {"fsdp": 4, "tensor": 2}
    for sizes, said in [
        ({"fsdp": 3}, "8 devices"),
        ({"fdsp": 8}, "unknown axis"),
        ({"fsdp": -1, "tensor": -1}, "at most one"),
    ]:
        with pytest.raises(ShardingError, match=said):
            make_mesh(sizes)


def test_an_axis_that_does_not_divide_is_named_with_sizes_that_do():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(ShardingError, match=r"layers/0/mlp: axis 'embed' of size 12.*1, 2, 3, 4, 6"):
        sharding_for((12, 4), ("embed", None), mesh, Strategy("fsdp", {"embed": ("fsdp",)}), name="layers/0/mlp")


def test_default_mesh_takes_the_largest_tensor_axis_that_fits():
    strategy = Strategy("tensor", {"mlp": ("tensor",), "batch": ("fsdp",)})
    mesh = default_mesh(strategy, lambda mesh: 12 % mesh.shape["tensor"] == 0, jax.devices())
    assert dict(mesh.shape) == {"fsdp": 2, "tensor": 4}
