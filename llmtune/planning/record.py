"""Plans as plain data: what `--json` writes, and what the page shows."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtune.planning.cache import versions
from llmtune.planning.layout import device_count
from llmtune.planning.plan import Plan
from llmtune.planning.text import verdict


def record(plan: Plan) -> dict[str, Any]:
    """Bytes are per device, FLOPs of a step over all devices, times in seconds."""
    layout = plan.layout
    run, chip = layout.run, layout.topology.chip
    return {
        "model": run.model,
        "topology": layout.topology.name,
        "chip": chip.name,
        "devices": device_count(layout.sizes),
        "strategy": layout.strategy.name,
        "mesh": layout.sizes,
        "remat": run.train.remat,
        "microbatches": run.train.microbatches,
        "rows": run.train.batch_size,
        "sequence_length": run.data.sequence_length,
        "fits": plan.fits,
        "verdict": verdict(plan),
        "memory": {**plan.memory, "needed": plan.needed, "limit": plan.limit, "estimated": layout.memory.total},
        "host_memory": layout.memory.host,
        "compiled": None if plan.compiled is None else {
            "arguments": plan.compiled.arguments,
            "alive": plan.compiled.alive,
            "kernels": list(plan.compiled.kernels),
            "seconds": round(plan.compiled.seconds, 1),
        },
        "flops": {"model": layout.costs.model_flops, "computed": layout.costs.computed_flops},
        "memory_traffic": layout.costs.memory_bytes,
        "collectives": [asdict(own) for own in plan.exchanged],
        "seconds": {**asdict(plan.times), "overlapped": plan.times.overlapped, "apart": plan.times.apart},
        "tokens_per_second": plan.tokens_per_second,
        "versions": versions(),
    }  # fmt: skip


def write_json(plans: Sequence[Plan], path: Path) -> None:
    """A list of records."""
    path.write_text(json.dumps([record(plan) for plan in plans], indent=2) + "\n", encoding="utf-8")
