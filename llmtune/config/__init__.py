"""A run as frozen dataclasses, and the strict way from YAML to them (`llmtune.config.file`)."""

from llmtune.config.data import DataSource, require_room, sources_of
from llmtune.config.optimization import Train
from llmtune.config.optimizers import AdamW, Optimizer
from llmtune.config.reference import key_reference
from llmtune.config.run import Run, Sharding, check

__all__ = [
    "AdamW",
    "DataSource",
    "Optimizer",
    "Run",
    "Sharding",
    "Train",
    "check",
    "key_reference",
    "require_room",
    "sources_of",
]
