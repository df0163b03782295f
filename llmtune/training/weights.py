"""From a run's configuration to the weights it trains: which base, which transform, what stays frozen."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from llmtune import pretrained
from llmtune.config import Run, Sharding, require_room
from llmtune.config.adapt import sections
from llmtune.config.quantize import kept
from llmtune.data import added_tokens
from llmtune.errors import LlmtuneConfigError
from llmtune.model import build_params, divides
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import Devices, Strategy, default_mesh, load_strategy, make_mesh
from llmtune.shipped import configs_directory
from llmtune.training.adapting import choose_transform
from llmtune.training.freezing import stacks
from llmtune.training.state_layout import state_layouts
from llmtune.transforms import Params, partition, quantize_each


@dataclass(frozen=True)
class Weights:
    """A model ready to train: its structure, what trains and what stays (each None where the other has an array).

    `whole`: the paths of weights that train in whole beside an adapter; `virtual_tokens`: how many a row begins with;
    `state_layouts`: where the optimizer's state is laid out otherwise than the weights (`training/state_layout.py`).
    """

    graphdef: Any
    trainable: Any
    frozen: Any
    whole: tuple[str, ...]
    virtual_tokens: int
    state_layouts: Any = None


def choose_layout(sharding: Sharding | None, declared: Any, devices: Devices | None = None) -> tuple[Mesh, Strategy]:
    """The mesh and the strategy table of a run; without a section, fsdp over all devices."""
    strategy = load_strategy("fsdp" if sharding is None else sharding.strategy, configs_directory() / "strategies")
    if sharding is not None and sharding.mesh:
        mesh = make_mesh(sharding.mesh, devices)
    else:
        mesh = default_mesh(strategy, lambda mesh: divides(declared, mesh, strategy), devices)
    return mesh, strategy.on(mesh)


def declare_base(run: Run, config: ModelConfig) -> tuple[Any, Params]:
    """The decoder's (graphdef, declared parameters), quantised, and cut into stacks, where the run says so.

    It is what is loaded, and laid out.
    """
    cut = stacks(sections(run.adapt), config.num_hidden_layers)
    graphdef, declared = declare(config, [stack.layers for stack in cut])
    own = quantize_each(kept(run.quantize))
    return graphdef, own.apply(declared, own.init(declared))


def check_strategy(source: pretrained.Source, virtual: int, mesh: Mesh, strategy: Strategy) -> None:
    """Refuse what a strategy cannot do with a model, or has nothing to do for."""
    if source.config.experts is None and mesh.shape.get("expert", 1) > 1:
        raise LlmtuneConfigError(
            f"sharding.strategy: {strategy.name} spreads experts over {mesh.shape['expert']} devices, and {source.name} has "
            "none; take fsdp_tensor, which splits heads and the MLP"
        )
    if virtual and strategy.spec("seq")[0] is not None:
        raise LlmtuneConfigError(
            f"sharding.strategy: {strategy.name} cuts rows along the sequence, which virtual tokens (a prompt or a prefix) "
            "cannot do yet; take fsdp_torus"
        )


def prepare_weights(
    run: Run, source: pretrained.Source, mesh: Mesh, strategy: Strategy, progress: pretrained.Progress
) -> Weights:
    """Load, adapt, partition. Weights that train are `train.masters`; a frozen base keeps its stored dtype."""
    graphdef, declared = declare_base(run, source.config)
    adapt = choose_transform(sections(run.adapt), source, declared, grown=bool(added_tokens(run)))
    virtual = LanguageModel(graphdef, adapt.declared).decoder().virtual_tokens()
    check_strategy(source, virtual, mesh, strategy)
    if virtual:
        require_room(virtual, run.data, "adapt")
    dtype = run.train.masters if run.adapt is None else None
    params = build_params(
        source, declared, adapt.transform, mesh, strategy, dtype=dtype, seed=run.train.seed, progress=progress
    )
    layouts = state_layouts(partition(adapt.declared, adapt.transform.trains)[0], mesh, strategy)
    trainable, frozen = partition(params, adapt.transform.trains)
    trainable = jax.tree.map(lambda leaf: leaf.astype(run.train.masters), trainable)
    return Weights(graphdef, trainable, frozen, adapt.whole, virtual, layouts)
