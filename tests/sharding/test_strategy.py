"""Strategy tables and meshes: what they say, and what they refuse."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from llmtune.config import Sharding
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.sharding import ShardingError, Strategy, default_mesh, load_strategy, make_mesh, sharding_for
from llmtune.sharding.mesh import over_slices, slices
from llmtune.sharding.strategy import strategy_from_table
from llmtune.shipped import configs_directory
from llmtune.training.weights import choose_layout
from llmtune.weights import shardings


def test_spec_follows_the_table():
    strategy = Strategy("s", {"embed": ("fsdp",), "mlp": ("tensor",), "both": ("fsdp", "tensor")})
    assert strategy.spec("layers", "embed", "mlp") == P(None, "fsdp", "tensor")
    assert strategy.spec("both", None) == P(("fsdp", "tensor"), None)


def test_one_mesh_axis_twice_in_a_tensor_is_refused():
    with pytest.raises(ShardingError, match="same mesh axis twice"):
        Strategy("s", {"embed": ("fsdp",), "mlp": ("fsdp",)}).spec("embed", "mlp")
    with pytest.raises(ShardingError, match="the axes expert, batch, seq of one tensor"):  # in the words of a table
        Strategy("s", {"expert": ("fsdp",), "batch": ("fsdp",)}).spec("expert", "rows", None)


SHIPPED = [
    "context",
    "context_expert",
    "ddp",
    "expert",
    "expert_all_to_all",
    "fsdp",
    "fsdp_tensor",
    "fsdp_torus",
    "hsdp",
    "sequence",
    "tensor",
    "zero1",
]


def test_shipped_strategies_load_and_say_what_they_do():
    directory = configs_directory() / "strategies"
    assert sorted(path.stem for path in directory.glob("*.yaml")) == SHIPPED
    for name in SHIPPED:
        strategy = load_strategy(name, directory)
        assert "Collectives:" in strategy.about and set(strategy.gather) <= set(strategy.mesh_axes)


def test_unknown_strategy_lists_the_known():
    with pytest.raises(
        ShardingError, match="known: context, context_expert, ddp, expert, expert_all_to_all, fsdp, fsdp_tensor"
    ):
        load_strategy("zero9", configs_directory() / "strategies")


def test_mesh_sizes():
    assert split(make_mesh({"fsdp": -1, "tensor": 2})) == {"fsdp": 4, "tensor": 2}
    for sizes, said in [
        ({"fsdp": 3}, "8 devices"),
        ({"fdsp": 8}, "unknown axis"),
        ({"fsdp": -1, "tensor": -1}, "at most one"),
    ]:
        with pytest.raises(ShardingError, match=said):
            make_mesh(sizes)


def split(mesh):
    """The axes along which there is more than one device."""
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("ddp", {"data": 8}), ("zero1", {"data": 8}), ("fsdp", {"fsdp": 8}), ("fsdp_torus", {"data": 2, "fsdp": 4}),
     ("hsdp", {"fsdp": 8}), ("tensor", {"data": 2, "tensor": 4}), ("fsdp_tensor", {"fsdp": 2, "tensor": 4}),
     ("sequence", {"fsdp": 2, "tensor": 4}), ("context", {"fsdp": 2, "context": 4})],
)  # fmt: skip
def test_each_strategy_chooses_a_mesh_of_its_own_axes(name, sizes):
    strategy = load_strategy(name, configs_directory() / "strategies")
    mesh = default_mesh(strategy, lambda mesh: mesh.shape["tensor"] <= 4, jax.devices())
    assert split(mesh) == sizes
    assert set(strategy.on(mesh).mesh_axes) == set(sizes)


def test_a_mesh_axis_that_the_table_does_not_use_is_refused():
    tensor = load_strategy("tensor", configs_directory() / "strategies")
    with pytest.raises(ShardingError, match="fsdp has 2 devices, and strategy tensor splits nothing over it"):
        tensor.on(make_mesh({"fsdp": 2, "tensor": 4}))


@pytest.mark.parametrize(
    ("table", "said"),
    [({"axes": {"embd": "fsdp"}}, "unknown logical axis 'embd'"), ({"axes": {"embed": "fdsp"}}, "unknown mesh axis 'fdsp'"),
     ({"gather": "x"}, "unknown mesh axis 'x'"), ({"axes": ["embed"]}, "must map logical axes"),
     ({"axis": {}}, "unknown key 'axis'")],
)  # fmt: skip
def test_a_table_with_a_typing_error_is_refused(table, said):
    with pytest.raises(ShardingError, match=said):
        strategy_from_table("mine", table)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"axes: [1, 2", "line 1: not valid YAML"), (b"\xff\xfe", "not UTF-8"), (b"- a\n- b\n", "a mapping is expected"),
     (b"", "empty; a strategy has"), (b"axes: {batch: fsdp}\naxes: {batch: data}\n", "the key 'axes' stands twice"),
     (b"axes: {embed: fsdp, embed: data}\n", "the key 'embed' stands twice"),
     (b"axes: {embed: [fsdp, fsdp]}\n", "names a mesh axis twice")],
)  # fmt: skip
def test_a_file_that_is_no_table_is_one_line(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ShardingError, match=said) as refused:
        load_strategy(str(path), configs_directory() / "strategies")
    assert "\n" not in str(refused.value)


class OnSlice:
    """A device that says which slice it is on, as those of TPU pods do."""

    def __init__(self, slice_index):
        self.slice_index = slice_index


def test_slices_are_what_the_outermost_axes_cross():
    assert slices([OnSlice(n // 4) for n in range(8)]) == 2
    shape = {"replica": 1, "data": 2, "fsdp": 4, "context": 1, "expert": 1, "tensor": 1}
    assert over_slices(shape, 1) == ((1, 2, 4, 1, 1, 1), None)
    assert over_slices(shape, 2) == ((1, 1, 4, 1, 1, 1), (1, 2, 1, 1, 1, 1))
    with pytest.raises(ShardingError, match="3 slices do not divide"):
        over_slices(shape, 3)


def test_an_axis_that_does_not_divide_is_named_with_sizes_that_do():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(ShardingError, match=r"layers/0/mlp: axis 'embed' of size 12.*1, 2, 3, 4, 6"):
        sharding_for((12, 4), ("embed", None), mesh, Strategy("fsdp", {"embed": ("fsdp",)}), name="layers/0/mlp")


def test_default_mesh_takes_the_largest_tensor_axis_that_fits():
    strategy = Strategy("tensor", {"mlp": ("tensor",), "batch": ("data",)})
    mesh = default_mesh(strategy, lambda mesh: 12 % mesh.shape["tensor"] == 0, jax.devices())
    assert split(mesh) == {"data": 2, "tensor": 4}


def test_heads_are_not_cut():
    """Four key-value heads of 16 are 64 columns, which eight devices would divide; the mesh leaves heads whole."""
    config = ModelConfig("LlamaForCausalLM", 64, 64, 64, 1, 8, 4, 16)
    _, declared = declare(config)
    tensor = load_strategy("tensor", configs_directory() / "strategies")
    with pytest.raises(
        ShardingError, match=r"layers/0/attention/k/kernel: axis 'kv_heads' of size 4 cannot be split 8 ways"
    ):
        shardings(declared, make_mesh({"fsdp": 1, "tensor": 8}), tensor)
    assert choose_layout(Sharding("tensor"), declared)[0].shape["tensor"] == 4
