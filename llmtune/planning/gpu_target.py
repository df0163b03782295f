"""GPUs that are not here: described to the compiler of NVIDIA's plugin, which then compiles for them on any machine.

    configs/chips.yaml, h100: target: {...}  -->  the text of XLA's GpuTargetConfigProto  -->  devices that programs compile for

Without the plugin, or of a chip whose file has no `target`, `StandIn`s make up the mesh: layouts and estimates need no more.
Products are not tuned, for which the card itself would be needed.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from llmtune.chips import Chip
from llmtune.errors import LlmtuneConfigError

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
OPTIONS = {"xla_gpu_autotune_level": 0}  # of the compiler: nothing can be timed


@dataclass(frozen=True)
class StandIn:
    """A GPU in a mesh that is only looked at."""

    id: int
    process_index: int
    device_kind: str
    platform: str = "gpu"


def gpus(chip: Chip, hosts: int, each: int) -> list[Any]:
    """So many hosts with so many GPUs each. Raises LlmtuneConfigError where the plugin refuses what it is told of them."""
    if chip.target is None or not has_compiler():
        return [StandIn(number, number // each, chip.kind) for number in range(hosts * each)]
    try:
        described = topologies.get_topology_desc(
            topology_name="",
            platform="cuda",
            target_config=target_config(chip, chip.target),
            topology=f"1x{hosts}x{each}",
        )
    except Exception as error:  # jaxlib has one type for all that its plugins say
        said = (str(error).splitlines() or [""])[0]
        raise LlmtuneConfigError(
            f"--topology: NVIDIA's plugin does not take {hosts}x{each} {chip.name}: {said}"
        ) from error
    return list(described.devices)


def has_compiler() -> bool:
    """Whether a plugin of jax for NVIDIA GPUs is installed; it need not find one."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(name) is not None for name in PLUGINS)


def target_config(chip: Chip, target: Mapping[str, Any]) -> str:
    """The text of the proto: what a chip's file says, and what all of NVIDIA's since compute capability 8.0 have in common."""
    extension = "ACCELERATED_FEATURES" if target["capability"] >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target["shared_bytes_of_block"]} shared_memory_per_core: {target["shared_bytes"]}
  core_count: {target["cores"]} fpus_per_core: {target["lanes"]} clock_rate_ghz: {target["clock_ghz"]}
  memory_bandwidth: {math.floor(chip.hbm_bandwidth)} device_memory_size: {chip.hbm_bytes} l2_cache_size: {target["l2_bytes"]}
  cuda_compute_capability {{ major: {target["capability"]} feature_extension: {extension} }}
  device_interconnect_info {{ active_links: {chip.links} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.kind}"
"""
