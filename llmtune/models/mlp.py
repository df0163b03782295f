"""SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmtune.models.config import ModelConfig
from llmtune.models.linear import Linear
from llmtune.models.residual import RESIDUAL, beside_blocks
from llmtune.models.swiglu import swiglu
from llmtune.weights import normal

Sums = dict[str, jax.Array]  # what a mixture of experts counts of its routing (see `llmtune.models.moe`); empty here


class MLP(nnx.Module):
    """[batch, seq, hidden] -> the same, laid out as RESIDUAL. `adapter` is the slot of a parallel adapter."""

    def __init__(self, config: ModelConfig):
        hidden, inner, init = config.hidden_size, config.intermediate_size, normal(config.initializer_range)
        wide, narrow, bias = ("batch", "seq", "act_mlp"), RESIDUAL, config.mlp_bias
        self.gate = Linear(hidden, inner, ("embed", "mlp"), init=init, out_axes=wide, bias=bias)
        self.up = Linear(hidden, inner, ("embed", "mlp"), init=init, out_axes=wide, bias=bias)
        self.down = Linear(inner, hidden, ("mlp", "embed"), init=init, out_axes=narrow, bias=bias)
        self.adapter: nnx.Param[Any] = nnx.Param(None)

    def __call__(self, x: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, Sums]:
        del counted
        gate, up = checkpoint_name(self.gate(x), "gate"), checkpoint_name(self.up(x), "up")
        out, adapter = self.down(swiglu(gate, up)), self.adapter.get_value()
        return out if adapter is None else out + beside_blocks(adapter.change(x)), {}
