"""Optimizers: from gradients to updates, each an optax transformation over the tree of weights that train."""

from llmtune.optimizers.choose import evaluated_weights, make_optimizer, updates_done
from llmtune.optimizers.paths import Rates, batch_axes, rates_by_rule
from llmtune.optimizers.rounding import rounded_by_chance, widened
from llmtune.optimizers.schedules import make_schedule

__all__ = [
    "Rates",
    "batch_axes",
    "evaluated_weights",
    "make_optimizer",
    "make_schedule",
    "rates_by_rule",
    "rounded_by_chance",
    "updates_done",
    "widened",
]
