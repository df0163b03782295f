"""Attention compiled for TPUs that are not here: the splash kernels are in the program, and how much memory it takes.

    pip install "jax[tpu]"        libtpu, which holds the compiler; no TPU is needed
    python -m benchmarks.attention_tpu
    python -m benchmarks.attention_tpu --topology v5p:2x2x1

Forward and backward of four packed rows over a mesh of four chips, two ways of rows and two of heads, as the dispatcher
chooses for them. Nothing is run: kernels and bytes are the compiler's, no time is a measurement of speed.
"""

import argparse
import os
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmtune.kernels import Mask, attention
from llmtune.models.decoder import Remat
from llmtune.sharding import make_mesh
from llmtune.training.remat import POLICIES

CASES = {  # tokens, heads, key heads, head size, window
    "Llama 3.1 8B": (8192, 32, 8, 128, None),
    "Llama 3.1 8B, a row that is no multiple of 128": (1000, 32, 8, 128, None),
    "Llama 3.2 1B": (4096, 32, 8, 64, None),
    "Mistral 7B v0.1": (8192, 32, 8, 128, 4096),
    "Mistral 7B, a narrow window": (4096, 32, 8, 128, 1024),
    "Mixtral 8x7B": (4096, 32, 8, 128, None),
    "heads of 80, an odd number of blocks": (2176, 8, 8, 80, 100),
    "one block": (128, 32, 8, 128, None),
}


def compiled(
    mesh: Mesh,
    seq: int,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    *,
    layers: int = 1,
    remat: Remat = lambda block: block,
) -> jax.stages.Compiled:
    """The gradient's program for bfloat16 rows, as `attention` chooses for the platform of the mesh.

    Layers are scanned, as in a model; each attends with the result of the one before as its queries.
    """

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        @remat
        def attend(q: jax.Array) -> jax.Array:
            return attention(q, k, v, mask=Mask(window=window), segments=segments, scale=size**-0.5)

        out, _ = jax.lax.scan(lambda q, _: (attend(q), None), q, None, length=layers)
        return out.astype(jnp.float32).sum()

    def heads_of(count: int) -> jax.ShapeDtypeStruct:
        layout = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor", None))
        return jax.ShapeDtypeStruct((4, seq, count, size), jnp.bfloat16, sharding=layout)

    segments = jax.ShapeDtypeStruct((4, seq), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", None)))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return run.lower(heads_of(heads), heads_of(kv_heads), heads_of(kv_heads), segments).compile()


def kernels_in(program: jax.stages.Compiled) -> int:
    """How many Pallas kernels the program runs."""
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="four chips")
    own = parser.parse_args()
    devices = topologies.get_topology_desc(own.topology, platform="tpu").devices
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, devices)
    print(f"{own.topology}: {len(devices)} x {devices[0].device_kind}, per chip 2 rows and half the heads", flush=True)
    for name, case in CASES.items():
        start = time.perf_counter()
        program = compiled(mesh, *case)
        kernels = kernels_in(program)
        seq, heads, kv_heads, size, window = case
        held = program.memory_analysis()
        scores = 2 * heads // 2 * seq * seq * 4
        print(
            f"{name}: {seq} tokens, {heads}/{kv_heads} heads of {size}, window {window}: {kernels} kernels, "
            f"temporary {held.temp_size_in_bytes / 1e6:.1f} MB (scores would be {scores / 1e6:,.0f}), "
            f"compiled in {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    for remat in ("none", "block"):
        kernels = kernels_in(compiled(mesh, *CASES["Mixtral 8x7B"], layers=2, remat=POLICIES[remat]))
        print(f"two layers under train.remat {remat}: {kernels} kernels", flush=True)


if __name__ == "__main__":
    main()
