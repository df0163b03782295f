"""Meshes, strategy tables, and the way from logical axes to shardings. Imports nothing of ours."""

from llmtune.sharding.layout import axis_size, on_own_part, parts, placed_by_compiler, put, replicated, sharding_for
from llmtune.sharding.mesh import Devices, OffTorusError, default_mesh, make_mesh
from llmtune.sharding.strategy import MESH_AXES, REPLICATED, ShardingError, Strategy, current, load_strategy, spec

__all__ = [
    "MESH_AXES",
    "REPLICATED",
    "Devices",
    "OffTorusError",
    "ShardingError",
    "Strategy",
    "axis_size",
    "current",
    "default_mesh",
    "load_strategy",
    "make_mesh",
    "on_own_part",
    "parts",
    "placed_by_compiler",
    "put",
    "replicated",
    "sharding_for",
    "spec",
]  # fmt: skip
