"""From the `optimizer` section of a run to one optax transformation: a table of optimizers.

    AdamW(clip_norm=1.0)  -->  chain(clip by global norm, AdamW under a schedule, rates by path)

A new optimizer is a dataclass in `llmtune/config/optimizers.py` and a row here. State has the weights' shapes and layouts, or
those that reductions of the weights have, so that it is spread over a mesh as they are.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import optax

from llmtune.config import Optimizer
from llmtune.config.optimizers import SGD, Adafactor, AdamW, AdamW8bit, Lion, Muon, ScheduleFreeAdamW
from llmtune.optimizers.adafactor import scale_by_adafactor, scale_by_size
from llmtune.optimizers.adamw_8bit import scale_by_adam_8bit
from llmtune.optimizers.muon import scale_by_muon
from llmtune.optimizers.paths import Rates, decays, is_hidden_matrix, scale_by_path
from llmtune.optimizers.schedule_free import average_of, schedule_free_adamw
from llmtune.weights import path_name

Mask = Callable[[Any], Any]  # a tree -> True where weights decay


def make_optimizer(
    config: Optimizer,
    schedule: optax.Schedule,
    rates: Rates = lambda path: 1.0,
    undecayed: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Clipping by global norm (where asked for), then the optimizer.

    `rates`: a leaf's path -> its learning rate, in that of all; `undecayed`: the paths of weights that do not decay.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    mask = decays(config.decay, tuple(undecayed))
    if isinstance(config, ScheduleFreeAdamW):
        return optax.chain(clip, _schedule_free(config, schedule, mask, rates))
    return optax.chain(clip, METHODS[type(config)](config, schedule, mask), scale_by_path(rates))


def evaluated_weights(config: Optimizer) -> Callable[[Any, Any], Any]:
    """(weights that train, optimizer state) -> the weights that are evaluated and exported: the same, but of averages."""
    if isinstance(config, ScheduleFreeAdamW):
        return lambda params, opt_state: average_of(config.b1, params, opt_state)
    return lambda params, opt_state: params


def updates_done(opt_state: Any) -> jax.Array:
    """int32 []: by which the schedule goes. Every optimizer counts; where several parts do, they agree."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def _adamw(config: AdamW, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask
    )


def _adamw_8bit(config: AdamW8bit, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    direction = scale_by_adam_8bit(b1=config.b1, b2=config.b2, eps=config.eps)
    return _with_decay(direction, config, schedule, mask)


def _adafactor(config: Adafactor, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    direction = scale_by_adafactor(decay_exponent=config.decay_exponent, clip_threshold=config.clip_threshold)
    size = scale_by_size() if config.scale_by_parameter else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    return optax.chain(direction, decay, size, optax.scale_by_learning_rate(schedule))


def _lion(config: Lion, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    return optax.lion(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=mask)


def _muon(config: Muon, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    parts: dict[Hashable, optax.GradientTransformation] = {
        True: scale_by_muon(
            momentum=config.momentum, nesterov=config.nesterov, iterations=config.iterations, adjust=config.adjust
        ),
        False: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
    }

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: is_hidden_matrix(path_name(path), leaf), params)

    return _with_decay(optax.partition(parts, matrices), config, schedule, mask)


def _sgd(config: SGD, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """torch.optim.SGD: the decay is added to the gradient, before momentum."""
    momentum = optax.trace(config.momentum, nesterov=config.nesterov) if config.momentum else optax.identity()
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask), momentum, optax.scale_by_learning_rate(schedule)
    )


def _with_decay(
    direction: optax.GradientTransformation, config: Optimizer, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
    """The direction and decoupled decay, both times the learning rate."""
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(schedule))


def _schedule_free(
    config: ScheduleFreeAdamW, schedule: optax.Schedule, mask: Mask, rates: Rates
) -> optax.GradientTransformation:
    steps = optax.chain(optax.add_decayed_weights(config.weight_decay, mask), scale_by_path(rates))

    def step_of(directions: Any, params: Any) -> Any:
        return steps.update(directions, steps.init(params), params)[0]

    return schedule_free_adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, step_of=step_of)


METHODS: dict[type, Callable[[Any, optax.Schedule, Mask], optax.GradientTransformation]] = {
    AdamW: _adamw,
    AdamW8bit: _adamw_8bit,
    Adafactor: _adafactor,
    Lion: _lion,
    Muon: _muon,
    SGD: _sgd,
}
