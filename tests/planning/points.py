"""Layouts whose memory libtpu has told: `python -m tests.planning.points [NAME ...]` asks it again and writes points.json.

Each asks for about 15 seconds of two cores: machine code is not made.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

from llmtune import pretrained
from llmtune.config.file import build_run
from llmtune.planning.ahead import assign_step
from llmtune.planning.layout import Layout, lay_out
from llmtune.planning.topology import devices, parse_topology

FILE = Path(__file__).parent / "points.json"
LORA = {"adapt": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"}}
QLORA = {**LORA, "quantize": {"base": "nf4"}}


def on(strategy: str, **mesh: int) -> dict[str, Any]:
    return {"sharding": {"strategy": strategy, "mesh": mesh}}


POINTS: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {  # name: topology, model, rows, length, other sections
    "8b-v5e256-fsdp": ("v5e:16x16", "llama3.1-8b", 256, 4096, on("fsdp")),
    "8b-v5e256-torus": ("v5e:16x16", "llama3.1-8b", 256, 4096, on("fsdp_torus")),
    "8b-v6e64-fsdp": ("v6e:8x8", "llama3.1-8b", 192, 8192, on("fsdp")),
    "8b-v6e64-fsdp-tensor": ("v6e:8x8", "llama3.1-8b", 64, 4096, on("fsdp_tensor", fsdp=8, tensor=8)),
    "8b-v6e64-sequence": ("v6e:8x8", "llama3.1-8b", 64, 4096, on("sequence", fsdp=8, tensor=8)),
    "8b-v5e64x2-hsdp": ("v5e:8x8*2", "llama3.1-8b", 128, 4096, on("hsdp")),
    "8b-v5p8-none": ("v5p:2x2x2", "llama3.1-8b", 8, 4096, {**on("fsdp"), "train": {"remat": "none"}}),
    "8b-v6e8-lora": ("v6e:2x4", "llama3.1-8b", 16, 4096, {**on("fsdp"), **LORA}),
    "8b-v5e8-lora-fsdp-tensor": ("v5e:2x4", "llama3.1-8b", 8, 4096, {**on("fsdp_tensor", fsdp=2, tensor=4), **LORA}),
    "8b-v5e8-qlora": ("v5e:2x4", "llama3.1-8b", 8, 4096, {**on("fsdp"), **QLORA}),
    "8b-v5e1-qlora": ("v5e-1", "llama3.1-8b", 1, 2048, {**on("fsdp"), **QLORA}),
    "70b-v5p128-fsdp": ("v5p:4x4x8", "llama3.1-70b", 128, 8192, on("fsdp")),
    "70b-v5p128-torus": ("v5p:4x4x8", "llama3.1-70b", 128, 8192, on("fsdp_torus")),
    "70b-v5p128-fsdp-tensor": ("v5p:4x4x8", "llama3.1-70b", 128, 8192, on("fsdp_tensor", fsdp=32, tensor=4)),
    "mistral-v5e16-fsdp": ("v5e:4x4", "mistral-7b-v0.1", 16, 4096, on("fsdp")),
    "mistral-v5e16-torus": ("v5e:4x4", "mistral-7b-v0.1", 16, 4096, on("fsdp_torus")),
    "mistral-v5e8-host": ("v5e:2x4", "mistral-7b-v0.3", 8, 4096, {**on("fsdp_torus"), "optimizer": {"memory": "host"}}),
    "nemo-v5p16-fsdp": ("v5p:2x2x4", "mistral-nemo-12b", 32, 4096, on("fsdp")),
    "mixtral-v5p4-qlora-expert": ("v5p:2x2x1", "mixtral-8x7b", 4, 2048, {**on("expert"), **QLORA}),
    "mixtral-v5p64-expert": ("v5p:4x4x4", "mixtral-8x7b", 256, 4096, on("expert", data=1, fsdp=16, expert=4)),
    "mixtral-v5p64-all-to-all": (
        "v5p:4x4x4",
        "mixtral-8x7b",
        512,
        4096,
        on("expert_all_to_all", data=4, fsdp=4, expert=4),
    ),
    "1b-v5e4-fsdp": ("v5e:2x2", "llama3.2-1b", 8, 2048, on("fsdp")),
    "1b-v5e4-ddp": ("v5e:2x2", "llama3.2-1b", 4, 2048, on("ddp")),
    "1b-v5e4-zero1": ("v5e:2x2", "llama3.2-1b", 4, 2048, on("zero1")),
    "1b-v5e4-microbatches": ("v5e:2x2", "llama3.2-1b", 16, 2048, {**on("fsdp"), "train": {"microbatches": 2}}),
    "1b-v5e16-dots": ("v5e:4x4", "llama3.2-1b", 32, 2048, {**on("fsdp"), "train": {"remat": "dots"}}),
    "3b-v5e4-lora-none": ("v5e:2x2", "llama3.2-3b", 8, 2048, {**on("fsdp"), **LORA, "train": {"remat": "none"}}),
    "3b-v6e1-lora": ("v6e-1", "llama3.2-3b", 4, 2048, {**on("fsdp"), **LORA}),
}


def layout_of(name: str) -> Layout:
    """The layout of a point. Its batch is in rows over all devices."""
    topology_name, model, rows, length, sections = POINTS[name]
    train = {"batch_size": rows, **sections.get("train", {})}
    tree = {
        "model": model,
        "output": "unused",
        "objective": "pretrain",
        "data": {"train": "unused", "sequence_length": length},
    }
    run = build_run({**tree, **sections, "train": train}, name)
    topology = parse_topology(topology_name)
    return lay_out(run, pretrained.open_source(model), topology, devices(topology))


def ask(name: str) -> int:
    """Bytes per device that libtpu needs for a point."""
    return assign_step(layout_of(name)).needed


def main(names: list[str]) -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or POINTS:
        try:
            known[name] = ask(name)
        except Exception as error:  # said, and the others asked
            print(name, type(error).__name__, str(error)[:200], flush=True)
            continue
        print(f"{name}: {known[name] / 1e9:.2f} GB, estimated {layout_of(name).memory.total / 1e9:.2f}", flush=True)
        FILE.write_text(json.dumps({name: known[name] for name in POINTS if name in known}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
