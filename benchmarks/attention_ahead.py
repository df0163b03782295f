"""Attention compiled for chips that are not here: which kernels are in the program, and how much memory it takes.

    pip install "jax[tpu]"                         libtpu, which holds the compiler; no TPU is needed
    python -m benchmarks.attention_ahead --chip v5e

    pip install "jax[cuda13]"                      CUDA's compiler and cuDNN; no GPU is needed
    python -m benchmarks.attention_ahead --chip h100

Forward and backward of four rows over a mesh of four chips, two ways of rows and two of heads, as the dispatcher chooses for
them. Nothing is run: kernels and bytes are the compiler's, no time is a measurement of speed.
"""

import argparse
import os
import re
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

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 85028896768 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
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
    packed: bool = True,
    layers: int = 1,
    remat: Remat = lambda block: block,
) -> jax.stages.Compiled:
    """The gradient's program for bfloat16 rows, as `attention` chooses for the platform of the mesh.

    Layers are scanned, as in a model; each attends with the result of the one before as its queries.
    """

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        @remat
        def attend(q: jax.Array) -> jax.Array:
            return attention(q, k, v, mask=Mask(window=window, packed=packed), segments=segments, scale=size**-0.5)

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
    """How many of the platform's own kernels the program runs: Pallas's on TPUs, cuDNN's on GPUs."""
    return len(re.findall(r'custom_call_target="(?:tpu_custom_call|__cudnn\$fmha\w*)"', program.as_text()))


def four(chip: str) -> Mesh:
    """A mesh of four chips that are not here."""
    if chip == "h100":
        topology = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x4x1")
    else:
        topology = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu")
    return make_mesh({"fsdp": 2, "tensor": 2}, topology.devices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=(*TOPOLOGIES, "h100"), default="v5e")
    own = parser.parse_args()
    mesh = four(own.chip)
    print(f"4 x {mesh.devices.flat[0].device_kind}, per chip 2 rows and half the heads", flush=True)
    for name, case in CASES.items():
        for packed in (True, False) if own.chip == "h100" else (True,):  # on a TPU it makes no difference
            start = time.perf_counter()
            program = compiled(mesh, *case, packed=packed)
            seq, heads, kv_heads, size, window = case
            scores = 2 * heads // 2 * seq * seq * 4
            print(
                f"{name}: {seq} tokens, {heads}/{kv_heads} heads of {size}, window {window}, "
                f"{'packed' if packed else 'one document per row'}: {kernels_in(program)} kernels, temporary "
                f"{program.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB (scores would be {scores / 1e6:,.0f}), "
                f"compiled in {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    for remat in ("none", "block"):
        program = compiled(mesh, *CASES["Mixtral 8x7B"], packed=own.chip != "h100", layers=2, remat=POLICIES[remat])
        print(f"two layers under train.remat {remat}: {kernels_in(program)} kernels", flush=True)


if __name__ == "__main__":
    main()
