"""What is read from optimised HLO: against text by hand, and against programs of libtpu whose exchanges are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmtune.planning.collectives import collectives, mesh_axes, wire_bytes
from llmtune.planning.hlo import read
from llmtune.planning.topology import devices, parse_topology
from llmtune.sharding import make_mesh

SCAN = """
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %one = s32[] constant(2)
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i, %one)
  %x = f32[8,16] get-tuple-element(%p), index=1
  %kernel.4 = f32[8,16] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={text="{
}}, metadata={op_name="a"}
  %sum = f32[8,16] all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %out = (s32[], f32[8,16]) tuple(%next, %sum)
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(11)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16] parameter(0)
  %zero = s32[] constant(1)
  %start = (s32[], f32[8,16]) tuple(%zero, %x)
  %loop = (s32[], f32[8,16]) while(%start), condition=%condition, body=%body
  %y = bf16[8,64] all-gather-start(%x), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}
  %z = f32[4] reduce-scatter(%x), channel_id=5, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %s = f32[4] collective-permute(%x), channel_id=6, source_target_pairs={{0,1},{1,0}}
  %rows = bf16[4,8] parameter(1)
  %away = bf16[32,8] ragged-all-to-all(%rows, %y), channel_id=7, replica_groups={{0,1},{2,3}}
  %room = bf16[32,8] parameter(2)
  %back = ((bf16[32,8], bf16[4,8]), bf16[4,8]) ragged-all-to-all-start(%room, %y), channel_id=8, replica_groups={{0,1},{2,3}}
  ROOT %r = f32[8,16] get-tuple-element(%loop), index=1
}
"""


def test_text_by_hand():
    found = {row.kind: row for row in collectives(read(SCAN), ("fsdp", "tensor"), (4, 2))}
    scanned = found["all-reduce"]  # 5 trips: 1, 3, 5, 7, 9
    assert (scanned.count, scanned.axes, scanned.ways, scanned.payload) == (5, "fsdp", 4, 5 * 8 * 16 * 4)
    assert scanned.wire == 5 * round(8 * 16 * 4 * 2 * 3 / 4)
    scattered = found["reduce-scatter"]
    assert (scattered.axes, scattered.payload, scattered.wire) == ("tensor", 2 * 16, 16)
    traveled = found["ragged-all-to-all"]  # four rows of the sender's, whatever room the receiver has
    assert (traveled.axes, traveled.payload, traveled.wire) == ("tensor", 2 * 4 * 8 * 2, 2 * 32)
    assert (found["collective-permute"].wire, found["collective-permute"].axes) == (16, "tensor")


def condition(name, bound):
    """Of a loop whose counter runs up to a bound."""
    return f"""
%{name} (p: (s32[], bf16[8,16], f32[8,16])) -> pred[] {{
  %p = (s32[], bf16[8,16], f32[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant({bound})
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}}
"""


SPREAD = """
HloModule jit_step, is_scheduled=true

%begin (w: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %w = bf16[8,16] parameter(0)
  %all-gather.1 = bf16[32,16] all-gather(%w), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  ROOT %begun = (bf16[8,16], bf16[32,16]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%advance (w: bf16[8,16], x: f32[8,16]) -> f32[8,16] {
  %w = bf16[8,16] parameter(0)
  %all-gather.2 = bf16[32,16] all-gather(%w), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %x = f32[8,16] parameter(1)
  ROOT %more = f32[8,16] add(%x, %x)
}

%inner (p: (s32[], bf16[8,16], f32[8,16])) -> (s32[], bf16[8,16], f32[8,16]) {
  %p = (s32[], bf16[8,16], f32[8,16]) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i, %one)
  %w = bf16[8,16] get-tuple-element(%p), index=1
  %x = f32[8,16] get-tuple-element(%p), index=2
  %y = f32[8,16] fusion(%w, %x), kind=kOutput, calls=%advance
  ROOT %out = (s32[], bf16[8,16], f32[8,16]) tuple(%next, %w, %y)
}

%layer (p: (s32[], bf16[8,16], f32[8,16])) -> (s32[], bf16[8,16], f32[8,16]) {
  %p = (s32[], bf16[8,16], f32[8,16]) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i, %one)
  %w = bf16[8,16] get-tuple-element(%p), index=1
  %x = f32[8,16] get-tuple-element(%p), index=2
  %started = (bf16[8,16], bf16[32,16]) fusion(%w), kind=kCustom, calls=%begin
  %zero = s32[] constant(0)
  %given = (s32[], bf16[8,16], f32[8,16]) tuple(%zero, %w, %x)
  %loop = (s32[], bf16[8,16], f32[8,16]) while(%given), condition=%inner_condition, body=%inner
  %y = f32[8,16] get-tuple-element(%loop), index=2
  ROOT %out = (s32[], bf16[8,16], f32[8,16]) tuple(%next, %w, %y)
}

ENTRY %main (w: bf16[8,16], x: f32[8,16]) -> f32[8,16] {
  %w = bf16[8,16] parameter(0)
  %x = f32[8,16] parameter(1)
  %zero = s32[] constant(0)
  %given = (s32[], bf16[8,16], f32[8,16]) tuple(%zero, %w, %x)
  %loop = (s32[], bf16[8,16], f32[8,16]) while(%given), condition=%layer_condition, body=%layer
  ROOT %r = f32[8,16] get-tuple-element(%loop), index=2
}
"""


def test_an_exchange_that_goes_on_in_a_loop_is_one():
    """A layer's weights are gathered while the blocks of its attention are walked through: 3 layers, not 300 blocks."""
    text = SPREAD + condition("inner_condition", 100) + condition("layer_condition", 3)
    found = collectives(read(text), ("fsdp", "tensor"), (4, 2))
    assert [(row.kind, row.axes, row.count, row.payload) for row in found] == [
        ("all-gather", "fsdp", 3, 3 * 32 * 16 * 2)
    ]


def test_rings():
    assert wire_bytes("all-gather", 80, 8) == 70 and wire_bytes("all-reduce", 80, 8) == 140
    assert wire_bytes("collective-permute", 80, 2) == 80


def test_groups_are_named_by_the_axes_along_which_they_differ():
    axes, sizes = ("replica", "fsdp", "tensor"), (2, 3, 4)
    assert mesh_axes([0, 12], axes, sizes) == "replica"
    assert mesh_axes([0, 4, 8], axes, sizes) == "fsdp"
    assert mesh_axes([0, 1, 2, 3], axes, sizes) == "tensor"
    assert mesh_axes(range(12), axes, sizes) == "fsdp+tensor"


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("libtpu")
    return make_mesh({"fsdp": 2, "tensor": 2}, devices(parse_topology("v5e:2x2")))


def exchanged(mesh, function, *layouts, shape=(512, 512)):
    """The collectives of a function of bfloat16 matrices on a v5e:2x2."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, own)) for own in layouts]
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arrays).compile().as_text()
    return collectives(read(text), mesh.axis_names, tuple(mesh.shape.values()))


def test_a_gathered_matrix_under_a_scan(mesh):
    def run(x, w):
        def body(x, _):
            return jnp.tanh(jnp.matmul(x, jax.sharding.reshard(w * x.sum(), PartitionSpec()))), None

        return jax.lax.scan(body, x, None, length=6)[0]

    rows = exchanged(mesh, run, PartitionSpec(), PartitionSpec("fsdp", None))
    gathered = [row for row in rows if row.kind == "all-gather"]
    assert [(row.axes, row.ways, row.count) for row in gathered] == [("fsdp", 2, 6)]
    assert gathered[0].payload == 6 * 512 * 512 * 2


def test_a_product_over_a_sharded_dimension(mesh):
    def run(x, w):
        return jnp.einsum("ij,jk->ik", x, w, out_sharding=PartitionSpec())

    rows = exchanged(mesh, run, PartitionSpec(None, "tensor"), PartitionSpec("tensor", None))
    assert [(row.kind, row.axes, row.count) for row in rows] == [("all-reduce", "tensor", 1)]
    assert rows[0].payload in (512 * 512 * 2, 512 * 512 * 4)
