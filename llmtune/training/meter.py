"""From the metrics of a step to the row that is logged: figures as numbers, speed, utilisation, memory, position, goodput.

loss, grad_norm, learning_rate, tokens, ...   what the step returned
seconds               from the end of the step before to the end of this one
tokens_per_second     without padding
tflops_per_device     the model's own FLOPs; `mfu` is their share of the chip's published peak, where that is known
device_bytes          taken on the fullest device of this process, where the platform counts them; host_bytes likewise
epoch                 passes over the training data, after this step
goodput               seconds of all steps up to here (those done twice counted once) / seconds since the run first began
loss/NAME, target_tokens/NAME   of each source of a mixture
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import jax

from llmtune.training.utilization import PAIRS, Work

BY_SOURCE = ("source_losses", "source_targets")


@final
@dataclass
class Meter:
    """Makes rows. `spent`: seconds of the steps before; `began`: when the run first began, seconds since 1970.

    `sources`: names of a mixture's; `position`: data figures of a step, such as its epoch.
    """

    work: Work
    sources: Sequence[str]
    position: Callable[[int], dict[str, Any]]
    spent: float
    began: float
    clock: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """The next step begins now: what came before (evaluating, saving) is not its time."""
        self.clock = time.perf_counter()

    def row(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, Any]:
        """The row of a step; waits until the device has done it."""
        values = dict(jax.device_get(metrics))
        parts = tuple(values.pop(name, None) for name in BY_SOURCE)
        pairs = float(values.pop(PAIRS, 0.0))
        row = {"step": step, **to_numbers(values)}
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        self.spent += seconds
        row |= {"seconds": seconds, "tokens_per_second": row["tokens"] / seconds}
        flops = self.work.flops(row["tokens"], pairs) / seconds
        row["tflops_per_device"] = flops / self.work.devices / 1e12
        if self.work.peak is not None:
            row["mfu"] = flops / self.work.peak
        row |= {**memory_in_use(), **self.position(step)}
        row["goodput"] = self.spent / max(time.time() - self.began, self.spent)
        return {**row, **by_source(self.sources, *parts, total=row["target_tokens"])}


def to_numbers(values: dict[str, Any]) -> dict[str, float | int]:
    """Scalars as Python numbers, the loss first; counts of tokens as integers."""
    ordered = sorted(values, key=lambda name: (name != "loss", name))
    return {name: int(values[name]) if name.endswith("tokens") else float(values[name]) for name in ordered}


def by_source(names: Sequence[str], losses: Any, targets: Any, total: float) -> dict[str, float | int]:
    """`loss/NAME` and `target_tokens/NAME` of the sources that the batch holds; the shares are of all `total` targets."""
    found: dict[str, float | int] = {}
    if losses is None or targets is None:
        return found
    for name, loss, share in zip(names, losses.tolist(), targets.tolist(), strict=True):
        if share > 0:
            found |= {f"loss/{name}": loss / share, f"target_tokens/{name}": round(share * total)}
    return found


def memory_in_use() -> dict[str, int]:
    """Bytes taken now; what the platform does not tell is left out."""
    counted = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.local_devices()]
    known = [own for own in counted if own is not None]
    found = {"device_bytes": max(known)} if known else {}
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return {**found, "host_bytes": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    except OSError:  # no Linux
        return found
