"""What accelerators can do, as their makers publish it: `configs/chips.yaml`, by name and by JAX's `device_kind`.

chips()["v5e"].flops            1.97e14
chip_of(jax.devices()[0])       None on a CPU: nothing is known of it, and nothing is guessed
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from llmtune.shipped import configs_directory


@dataclass(frozen=True)
class Chip:
    """Rates of one device in FLOP/s (bfloat16) and bytes/s in one direction; sizes in bytes. See the file's head."""

    name: str
    kind: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    host_devices: int
    dcn_bandwidth: float
    source: str
    target: Mapping[str, Any] | None = None


@functools.cache
def chips() -> Mapping[str, Chip]:
    """All chips that are known, by name."""
    table = yaml.safe_load((configs_directory() / "chips.yaml").read_text(encoding="utf-8"))
    return MappingProxyType({name: Chip(name=name, **row) for name, row in table.items()})


def chip_of(device: Any) -> Chip | None:
    """The chip of a jax.Device, by its `device_kind`; None where the file does not know it."""
    return next((chip for chip in chips().values() if chip.kind == device.device_kind), None)
