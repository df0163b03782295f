"""Sharding strategies side by side, from the planner: memory, FLOPs, bytes exchanged, least time of a step.

    python -m benchmarks.strategies                     in closed form, seconds for the whole table
    python -m benchmarks.strategies --compile           what the TPU compiler says (pip install 'llmtune[plan]'; minutes for each)
    python -m benchmarks.strategies --only llama3.1-8b  cases whose name begins so

Of each case: bf16 compute, block remat, float32 weights and AdamW moments where they train, rows of one document. Nothing is run.
`least time` is the larger of arithmetic, memory and exchanges at the chip's published rates (all overlapped); `apart` is their
sum over what does not overlap. GB = 1e9 bytes, per device.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass

os.environ["JAX_PLATFORMS"] = "cpu"

from llmtune import pretrained
from llmtune.config import Run
from llmtune.config.file import build_run
from llmtune.errors import LlmtuneError
from llmtune.planning.ahead import assign_step
from llmtune.planning.layout import describe_mesh, lay_out, with_strategy
from llmtune.planning.plan import Plan, plan_layout
from llmtune.planning.topology import devices, parse_topology
from llmtune.sharding import ShardingError
from llmtune.training.vocabulary import settle_vocabulary

DENSE = ("ddp", "zero1", "fsdp", "fsdp_torus", "tensor", "fsdp_tensor", "sequence", "context")


@dataclass(frozen=True)
class Case:
    """A model and a batch of rows for a slice."""

    model: str
    topology: str
    rows: int
    length: int
    strategies: tuple[str, ...] = DENSE
    method: str = "full"

    @property
    def name(self) -> str:
        """How a table calls it."""
        return f"{self.model} {self.method}, {self.rows} x {self.length}, {self.topology}"

    def run(self) -> Run:
        """Its configuration."""
        adapt = {"adapt": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"}}
        return build_run(
            {
                "model": self.model, "output": "unused", "objective": "pretrain",
                "data": {"train": "unused", "sequence_length": self.length},
                "train": {"batch_size": self.rows, "steps": 1000, "dtype": "bfloat16", "remat": "block"},
                **({} if self.method == "full" else adapt),
                **({"quantize": {"base": "nf4"}} if self.method == "qlora" else {}),
            },
            self.name,
        )  # fmt: skip


CASES = (
    Case("llama3.1-8b", "v5e:16x16", 256, 4096),
    Case("llama3.1-8b", "v6e:8x8", 192, 8192),
    Case("llama3.1-70b", "v5p-256", 128, 8192),
    Case("mistral-7b-v0.1", "v5e:4x4", 16, 4096),
    Case("mixtral-8x7b", "v5p-128", 512, 4096, ("fsdp", "fsdp_torus", "fsdp_tensor", "expert", "expert_all_to_all")),
    Case("llama3.1-8b", "v6e:2x4", 16, 4096, ("ddp", "fsdp", "fsdp_torus", "tensor"), "lora"),
    Case("llama3.1-8b", "v5e:2x4", 8, 4096, ("ddp", "fsdp", "fsdp_torus", "tensor"), "qlora"),
    Case("llama3.1-8b", "v5p-64", 4, 131072, ("fsdp_torus", "sequence", "context")),
)


def plans(case: Case, compiles: bool) -> Iterator[Plan | str]:
    """A plan for each strategy, or why there is none."""
    run, topology = case.run(), parse_topology(case.topology)
    source, _ = settle_vocabulary(run, pretrained.open_source(run.model))
    placed = devices(topology)
    for name in case.strategies:
        try:
            layout = lay_out(with_strategy(run, name), source, topology, placed)
            yield plan_layout(layout, assign_step, lambda line: None) if compiles else Plan(layout, None)
        except (LlmtuneError, ShardingError) as error:
            yield f"{name} | {error}"


def row(plan: Plan) -> str:
    times, wire = plan.times, sum(own.wire for own in plan.exchanged)
    layout = plan.layout
    fits = "" if plan.fits else " (does not fit)"
    return (
        f"| {layout.strategy.name} | {describe_mesh(layout.sizes)} | {plan.needed / 1e9:.1f}{fits} | {wire / 1e9:.1f} "
        f"| {times.overlapped:.2f} | {times.apart:.2f} | {times.mfu:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="ask the TPU compiler instead of the closed form")
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    own = parser.parse_args()
    for case in CASES:
        if not case.name.startswith(own.only):
            continue
        print(
            f"\n{case.name}\n\n| strategy | mesh | GB needed | GB on the wire | least time, s | apart, s | MFU at most |"
        )
        print("|---|---|---|---|---|---|---|")
        for plan in plans(case, own.compile):
            print(row(plan) if isinstance(plan, Plan) else f"| {plan} | | | | | |", flush=True)


if __name__ == "__main__":
    main()
