"""Mixture of experts (Jiang et al. 2024, arXiv:2401.04088): each token goes through the k MLPs its router likes best.

    p = softmax(x @ router)                     in float32, over all experts
    y = sum over the k largest p of  p_e / (their sum) * down_e(silu(gate_e(x)) * up_e(x))

No token is dropped: rows are sorted by expert, and each matrix of all experts is one grouped matmul over them. Every device
sorts its own tokens; where experts are spread over devices, each computes its own experts for the tokens of its rows, and the
parts of a token are added up once, after `down`. Arrays of sorted rows are [expert parts, row parts, rows, width], where a part
of the rows is what one device has of batch and sequence. A strategy may have the tokens travel instead (`traveling_tokens.py`).

Training adds the load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eqs. 4 to 6, with transformers' means over the
tokens of all layers, padding left out) and, where the config asks for it, the router's z-loss (Zoph et al. 2022,
arXiv:2202.08906, eq. 5). Layers return sums; `routing_losses` divides them once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmtune.models.config import Experts, ModelConfig
from llmtune.models.linear import Linear
from llmtune.models.mlp import Sums
from llmtune.models.residual import beside_blocks
from llmtune.models.swiglu import swiglu
from llmtune.models.traveling_tokens import through_spread_experts, tokens_travel
from llmtune.sharding import parts, placed_by_compiler, spec
from llmtune.weights import ArraySpec, Initializer, expert_linear, normal

ROWS = ("expert", "rows", None)  # logical axes of sorted rows, before their width


class ExpertLinear(nnx.Module):
    """Sorted rows times the matrix of their expert; kernel [experts, in, out]."""

    def __init__(self, experts: int, n_in: int, n_out: int, axes: tuple[str, str], *, init: Initializer, out_axis: str):
        self.kernel: nnx.Param[Any] = nnx.Param(ArraySpec((experts, n_in, n_out), ("expert", *axes), init=init))
        self.out_axis = out_axis

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return expert_linear(rows, self.kernel.get_value(), group_sizes, (*ROWS, self.out_axis))


class ExpertMLP(nnx.Module):
    """The MLPs of all experts over sorted rows [expert parts, row parts, rows, hidden]."""

    def __init__(self, config: ModelConfig, experts: int):
        hidden, inner, init = config.hidden_size, config.intermediate_size, normal(config.initializer_range)
        self.gate = ExpertLinear(experts, hidden, inner, ("embed", "mlp"), init=init, out_axis="act_mlp")
        self.up = ExpertLinear(experts, hidden, inner, ("embed", "mlp"), init=init, out_axis="act_mlp")
        self.down = ExpertLinear(experts, inner, hidden, ("mlp", "embed"), init=init, out_axis="act_embed")

    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        return self.down(swiglu(self.gate(rows, sizes), self.up(rows, sizes)), sizes)

    def traveling(self, x: jax.Array, chosen: jax.Array, weights: jax.Array, number: int) -> jax.Array:
        """[batch, seq, hidden], each token having been where its experts are."""
        module, kernels = nnx.split(self)

        def apply(kernels: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
            return nnx.merge(module, kernels)(rows[None, None], sizes[None, None])[0, 0]

        return through_spread_experts(apply, kernels, x, chosen, weights, number)


class MoE(nnx.Module):
    """[batch, seq, hidden] -> the same, and the sums of its routing. `adapter` is the slot of a parallel adapter."""

    def __init__(self, config: ModelConfig):
        assert config.experts is not None
        self.number, self.chosen = config.experts.num_local_experts, config.experts.num_experts_per_tok
        self.router = Linear(
            config.hidden_size,
            self.number,
            ("embed", None),
            init=normal(config.initializer_range),
            out_axes=("batch", "seq", None),
        )
        self.experts = ExpertMLP(config, self.number)
        self.adapter: nnx.Param[Any] = nnx.Param(None)

    def __call__(self, x: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, Sums]:
        weights, chosen, logits, probabilities = self.route(x)
        out, adapter = self.through_experts(x, chosen, weights), self.adapter.get_value()
        out = out if adapter is None else out + adapter.change(x)
        return beside_blocks(out), routing_sums(logits, probabilities, chosen, counted)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(weights, chosen) [batch, seq, k], and the (logits, probabilities) [batch, seq, experts] they come from."""
        logits = self.router(x.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.chosen)
        # One expert's share of itself is 1 whatever the router thinks; p / p would send rounding errors back as its gradient.
        weights = weights / weights.sum(axis=-1, keepdims=True) if self.chosen > 1 else jnp.ones_like(weights)
        return weights, chosen, logits, probabilities

    def through_experts(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """The weighted sum of the chosen experts' results. chosen int32, weights float32, both [batch, seq, k]."""
        if tokens_travel():
            return self.experts.traveling(x, chosen, weights, self.number)
        k, width = self.chosen, x.shape[-1]
        tokens, picks, shares = by_part(x, "act_embed"), by_part(chosen, None), by_part(weights, None)
        ways, number, _ = tokens.shape
        order, place, sizes = self.sorted_by_expert(_reshape(picks, (ways, number * k), "rows", None))
        rows = placed_by_compiler(_take_rows, *ROWS, "act_embed")(tokens, order // k)
        rows = self.experts(rows, sizes)
        rows = placed_by_compiler(_take_own_rows, *ROWS, "act_embed")(rows, place).astype(jnp.float32)
        results = _reshape(rows, (len(rows), ways, number, k, width), *ROWS, None, "act_embed")
        mixed = (results * shares[..., None]).sum(axis=3).sum(axis=0)  # a row is zero in all parts of experts but one
        return whole(mixed.astype(x.dtype), x.shape[:2], "act_embed")

    def sorted_by_expert(self, picks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For each part of the experts: the picks in order of expert, its own first; where each went; rows per own expert.

        picks int32 [row parts, rows]: the expert that each row chose -> order and place int32 [expert parts, row parts,
        rows], sizes int32 [expert parts, row parts, own experts].
        """
        ways = parts("expert")
        own = self.number // ways
        first = jnp.arange(ways, dtype=jnp.int32)[:, None, None] * own
        ranks = jax.sharding.reshard((picks[None] - first) % self.number, spec(*ROWS))
        order = jnp.argsort(ranks, axis=-1, stable=True).astype(jnp.int32)
        place = jnp.argsort(order, axis=-1).astype(jnp.int32)
        sizes = (ranks[..., None] == jnp.arange(own)).sum(axis=2).astype(jnp.int32)
        return order, place, sizes


def by_part(x: jax.Array, axis: str | None) -> jax.Array:
    """[batch, seq, width] -> [row parts, tokens of a part, width]: what a device has of batch and sequence stays there."""
    (batch, seq, width), (ways, cuts) = x.shape, (parts("batch"), parts("seq"))
    cut = _reshape(x, (ways, batch // ways, cuts, seq // cuts, width), "batch", None, "seq", None, axis).swapaxes(1, 2)
    return _reshape(cut, (ways * cuts, batch * seq // (ways * cuts), width), "rows", None, axis)


def whole(x: jax.Array, shape: tuple[int, ...], axis: str | None) -> jax.Array:
    """The way back from `by_part`: [row parts, tokens, width] -> [batch, seq, width]."""
    (batch, seq), width, (ways, cuts) = shape, x.shape[-1], (parts("batch"), parts("seq"))
    cut = _reshape(x, (ways, cuts, batch // ways, seq // cuts, width), "batch", "seq", None, None, axis).swapaxes(1, 2)
    return _reshape(cut, (batch, seq, width), "batch", "seq", axis)


def _take_rows(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """[parts, tokens, width], int32 [copies, parts, rows] -> [copies, parts, rows, width]."""
    return jax.vmap(jax.vmap(lambda own, at: own[at]), in_axes=(None, 0))(tokens, index)


def _take_own_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
    """[copies, parts, rows, width], int32 [copies, parts, rows] -> like rows."""
    return jax.vmap(jax.vmap(lambda own, at: own[at]))(rows, index)


def _reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    return jax.lax.reshape(x, shape, out_sharding=spec(*axes))


def routing_sums(
    logits: jax.Array, probabilities: jax.Array, chosen: jax.Array, counted: jax.Array | None
) -> dict[str, jax.Array]:
    """Over the tokens where `counted` (float32 [batch, seq]; None: all) is 1: how many, what they chose, what they thought."""
    counted = jnp.ones(logits.shape[:2], jnp.float32) if counted is None else counted
    hits = (chosen[..., None] == jnp.arange(logits.shape[-1])).sum(axis=2).astype(jnp.float32)
    each = counted[..., None]
    return {
        "tokens": counted.sum(),
        "assigned": (hits * each).sum(axis=(0, 1)),
        "probability": (probabilities * each).sum(axis=(0, 1)),
        "square": (jnp.square(jax.nn.logsumexp(logits, axis=-1)) * counted).sum(),
    }


def routing_losses(sums: Sums, experts: Experts) -> dict[str, jax.Array]:
    """From sums over layers and tokens: `aux_loss`, `z_loss` where it is used, and `penalty`, what training adds to the mean."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    balance = (sums["assigned"] / tokens * sums["probability"] / tokens).sum() * experts.num_local_experts
    losses = {"aux_loss": balance, "penalty": experts.router_aux_loss_coef * balance}
    if experts.router_z_loss_coef:
        losses["z_loss"] = sums["square"] / tokens
        losses["penalty"] += experts.router_z_loss_coef * losses["z_loss"]
    return losses
