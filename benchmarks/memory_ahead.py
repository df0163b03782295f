"""The train step of a run compiled for a TPU that is not here: how much memory it takes, and what takes it.

    pip install "jax[tpu]"                                              libtpu, which holds the compiler; no TPU is needed
    python -m benchmarks.memory_ahead                                   Llama 3 8B on one v5e chip
    python -m benchmarks.memory_ahead --model llama3-70b --chip v5p     Llama 3 70B on one v5p chip

QLoRA of rank 16 on all linear layers, NF4 with double quantisation, embeddings and head bfloat16, one row of 2,048 tokens,
block rematerialisation, splash attention. It is the step of `llmtune train`, from a configuration like any other; only its
weights are shapes. Nothing is run: bytes are the compiler's (GB = 1e9).
"""

import argparse
import os
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.file import build_run
from llmtune.planning.abstract import abstract_program
from llmtune.sharding import Strategy, load_strategy, make_mesh
from llmtune.shipped import configs_directory

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # the smallest there are; one chip of it is used


def run_of(model: str, length: int, base: str | None) -> Run:
    tree = {
        "model": model, "output": "unused", "objective": "pretrain",
        "data": {"train": "unused", "sequence_length": length},
        "adapt": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        "train": {"batch_size": 1, "dtype": "bfloat16", "remat": "block", "steps": 1000},
    }  # fmt: skip
    return build_run({**tree, "quantize": {"base": base}} if base else tree, "benchmark")


def compiled(run: Run, mesh: Mesh, strategy: Strategy) -> tuple[jax.stages.Compiled, dict[str, int]]:
    """The step's program, and the bytes of what goes into it."""
    with jax.set_mesh(mesh):
        program, inputs = abstract_program(run, pretrained.open_source(run.model), mesh, strategy)
        step, _ = program.compile(inputs.state, inputs.batch)
    parts = {
        "weights": inputs.weights.frozen,
        "adapters": inputs.state.trainable,
        "moments": inputs.state.opt_state,
    }
    return step, {name: nbytes(own) for name, own in parts.items()}


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def table(run: Run, sizes: Mapping[str, int], step: jax.stages.Compiled) -> str:
    """GB of each part. Activations: what each block keeps, its input; temporaries: all else that the peak holds."""
    config, peak = pretrained.open_source(run.model).config, step.memory_analysis().peak_memory_in_bytes
    width = jnp.dtype(run.train.dtype).itemsize
    kept = run.train.batch_size * run.data.sequence_length * config.hidden_size * width * config.num_hidden_layers
    rest = peak - sum(sizes.values()) - kept
    rows = {**sizes, "activations": kept, "temporaries": rest, "peak": peak}
    return " | ".join(f"{name} {size / 1e9:.2f}" for name, size in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", help="a preset")
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5e")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--base", choices=("nf4", "int4", "int8", "fp8", "none"), default="nf4")
    own = parser.parse_args()
    start = time.perf_counter()
    device = topologies.get_topology_desc(TOPOLOGIES[own.chip], platform="tpu").devices[:1]
    mesh, strategy = make_mesh({}, device), load_strategy("fsdp", configs_directory() / "strategies")
    run = run_of(own.model, own.length, None if own.base == "none" else own.base)
    step, sizes = compiled(run, mesh, strategy)
    memory = step.memory_analysis()
    print(f"{own.model}, {own.base}, 1 x {own.length} tokens, one {device[0].device_kind} chip (GB):")
    print(table(run, sizes, step))
    print(
        f"arguments {memory.argument_size_in_bytes / 1e9:.2f}, temporary allocation {memory.temp_size_in_bytes / 1e9:.2f}, "
        f"compiled in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
