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
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.adapt import sections
from llmtune.config.file import build_run
from llmtune.sharding import Strategy, load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.training.adapting import choose_transform
from llmtune.training.program import assemble
from llmtune.training.state import TrainState
from llmtune.training.weights import Weights, declare_base
from llmtune.transforms import partition
from llmtune.weights import ArraySpec, is_operator, shardings

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # the smallest there are; one chip of it is used


def run_of(model: str, length: int, base: str | None) -> Run:
    tree = {
        "model": model, "output": "unused", "objective": "pretrain",
        "data": {"train": "unused", "sequence_length": length},
        "adapt": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        "train": {"batch_size": 1, "dtype": "bfloat16", "remat": "block", "steps": 1000},
    }  # fmt: skip
    return build_run({**tree, "quantize": {"base": base}} if base else tree, "benchmark")


def abstract_weights(run: Run, source: pretrained.Source, mesh: Mesh, strategy: Strategy) -> Weights:
    """`prepare_weights` without weights: what is stored plainly has the dtype that config.json names."""
    stored = source.hf_config.get("dtype") or source.hf_config["torch_dtype"]
    graphdef, declared = declare_base(run, source.config)
    declared = jax.tree.map(lambda w: w if is_operator(w) else replace(w, dtype=stored), declared, is_leaf=is_operator)
    adaptation = choose_transform(sections(run.adapt), source, declared, grown=False)
    transform = adaptation.transform
    adapted = transform.apply(declared, transform.init(declared))
    arrays = jax.tree.map(
        lambda spec, layout: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=layout),
        adapted,
        shardings(adapted, mesh, strategy),
        is_leaf=lambda leaf: isinstance(leaf, ArraySpec),
    )
    return Weights(graphdef, *partition(arrays, transform.trains), adaptation.whole)


def compiled(run: Run, mesh: Mesh, strategy: Strategy) -> tuple[jax.stages.Compiled, dict[str, int]]:
    """The step's program, and the bytes of what goes into it."""
    with jax.set_mesh(mesh):
        weights = abstract_weights(run, pretrained.open_source(run.model), mesh, strategy)
        program, optimizer, _ = assemble(run, weights, 1000, mesh, strategy)
        moments = jax.tree.map(lambda leaf: on(mesh, leaf), jax.eval_shape(optimizer.init, weights.trainable))
        state = TrainState(on(mesh, jax.ShapeDtypeStruct((), jnp.int32)), weights.trainable, moments)
        layout = NamedSharding(mesh, strategy.spec("batch", "seq"))
        rows = jax.ShapeDtypeStruct((run.train.batch_size, run.data.sequence_length), jnp.int32, sharding=layout)
        batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), rows)
        step, _ = program.compile(state, batch)
    sizes = {"weights": nbytes(weights.frozen), "adapters": nbytes(weights.trainable), "moments": nbytes(moments)}
    return step, sizes


def on(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    typed = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, typed))


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
