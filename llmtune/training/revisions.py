"""What a run's sections add to its plain step, in the order in which a proposed step passes through.

    train.dtype: float16    a loss scale
    divergence              spikes are looked for, bad steps left out

A loss scale follows overflows that were left out, and so comes last.
"""

import jax
import optax

from llmtune.config import Run
from llmtune.training.guard import skip_bad_steps, watch_spikes
from llmtune.training.loss_scale import scale_loss
from llmtune.training.state import Metrics, Revision, TrainState


def choose_revisions(run: Run, schedule: optax.Schedule) -> tuple[Revision, ...]:
    """The revisions of a run; none where it asks for nothing."""
    chosen, policy = [], run.divergence
    if policy.spikes != "off":
        chosen.append(watch_spikes(policy.window, policy.sigmas))
    if policy.non_finite == "skip":
        chosen.append(skip_bad_steps(schedule, *((_spiked,) if policy.spikes not in ("off", "warn") else ())))
    if run.train.dtype == "float16":
        chosen.append(scale_loss(run.train.loss_scale, run.train.loss_scale_interval))
    return tuple(chosen)


def _spiked(state: TrainState, metrics: Metrics) -> jax.Array:
    del state
    return metrics["spike"] > 0
