"""Bytes on each device at the fullest moment of a step, in closed form: for search, and where there is no compiler.

    state       weights, adapters, moments: exact, from shapes, dtypes and shardings
    gradients   float32, laid out as what trains; twice where microbatches are added up
    copies      of the blocks' trainable weights in 16 bits, formed before the scan; not on TPUs (weights/narrow.py)
    kept        what the remat policy keeps of every block for the backward pass, from the names that blocks give
    block       intermediate arrays of the block that goes backward
    loss        logits of one piece of the vocabulary, and what stands around them

Which intermediate arrays have places of their own is the compiler's choice. Their number was fitted to programs of libtpu:
tests/planning/points.json has what each of them needs, and a test holds the estimate to within 10 % of it.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmtune.config import Run
from llmtune.models.config import ModelConfig
from llmtune.models.traveling_tokens import PIECE
from llmtune.planning.abstract import Inputs, device_bytes, part_bytes
from llmtune.planning.traffic import traveling
from llmtune.sharding import Strategy, axis_size
from llmtune.weights import vocabulary_loss

# How many arrays of one size are there at once, fitted: in a block's backward pass, of the MLP's width (of experts more, since
# sorted rows stand beside tokens) and of the residual's; around the loss, of the logits.
INNER, EXPERTS, HIDDEN, LOGITS = 9.5, 10.6, 5.5, 3.5
# Bytes, fitted, for each number of a device's own experts of one layer where tokens travel: gathered, widened, its gradient.
HELD = 16
PASSING = 5.0  # float32 arrays of one weight while its moments come, are updated and go; fitted
CHUNK = 512  # tokens of a row whose logits a device holds at a time, where it has the head for itself


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, part by part; `total` is the fullest moment of a step.

    `block`: intermediate arrays of the block that goes backward; `loss`: those around the logits. One of them is there at a time.
    `passing`: moments that come from the host's memory for their update and go back, when nothing of the passes is there.
    `host`: what waits in that memory, for each device of the host.
    """

    weights: int
    adapters: int
    moments: int
    gradients: int
    copies: int
    kept: int
    block: int
    loss: int
    passing: int = 0
    host: int = 0

    @property
    def state(self) -> int:
        """What is there before a step begins."""
        return self.weights + self.adapters + self.moments

    @property
    def temporaries(self) -> int:
        """What comes and goes within a step, besides gradients and what blocks keep."""
        return max(self.copies + max(self.block, self.loss), self.passing - self.kept)

    @property
    def total(self) -> int:
        """Of all at the fullest moment."""
        return self.state + self.gradients + self.kept + self.temporaries


def estimate_memory(run: Run, config: ModelConfig, inputs: Inputs, mesh: Mesh, strategy: Strategy) -> Memory:
    """Of one layout of a run."""
    trainable, frozen = inputs.weights.trainable, inputs.weights.frozen
    whole, itemsize = device_bytes(jax.tree.leaves(trainable)), jnp.dtype(run.train.dtype).itemsize
    moments = jax.tree.leaves(inputs.state.opt_state)

    def ways(*axes: str) -> int:
        return math.prod(axis_size(mesh, part) for part in strategy.spec(*axes))

    tokens = run.train.batch_size * run.data.sequence_length / run.train.microbatches / ways("batch", "seq")
    residual = tokens * ways("seq") / ways("residual_seq") * config.hidden_size / ways("act_embed")
    experts = config.experts
    inner = tokens * config.intermediate_size / ways("act_mlp")
    inner *= INNER if experts is None else EXPERTS * experts.num_experts_per_tok
    held = 0.0
    if experts is not None and traveling(strategy):
        inner *= ways("expert") * min(1, PIECE / tokens)  # room for all that a piece of each device could send
        matrices = 3 * config.hidden_size * config.intermediate_size / ways("act_mlp")
        held = HELD * matrices * experts.num_local_experts / ways("expert")
    whole_logits = tokens * config.vocab_size / ways("act_vocab") * 4
    shared = ways("batch", "seq") > 1  # then `vocabulary_loss` cuts the vocabulary, else `head_loss` the rows
    logits = (
        min(vocabulary_loss.LOGITS, whole_logits) if shared else whole_logits * min(1, CHUNK / run.data.sequence_length)
    )
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    wide = (
        []
        if on_tpu
        else [leaf for leaf in jax.tree.leaves(trainable["layers"]) if jnp.dtype(leaf.dtype).itemsize > itemsize]
    )
    return Memory(
        weights=device_bytes(jax.tree.leaves(frozen)) + (whole if run.adapt is None else 0),
        adapters=0 if run.adapt is None else whole,
        moments=device_bytes(moments),
        gradients=sum(map(_local, jax.tree.leaves(trainable))) * 4 * (1 if run.train.microbatches == 1 else 2),
        copies=sum(map(_local, wide)) * itemsize,
        kept=round(_kept(run, config, tokens, residual, ways) * config.num_hidden_layers),
        block=round((inner + HIDDEN * residual) * itemsize + held),
        loss=round(LOGITS * logits + 4 * tokens * config.hidden_size),
        passing=round(PASSING * max(map(_local, jax.tree.leaves(trainable))) * 4)
        if run.optimizer.memory == "host"
        else 0,
        host=part_bytes(moments)
        - device_bytes(moments)
        + round(residual * itemsize * config.num_hidden_layers * (run.train.remat == "offload")),
    )


def _kept(run: Run, config: ModelConfig, tokens: float, residual: float, ways: Any) -> float:
    """Bytes that one block keeps: its input, and what the remat policy names."""
    itemsize = jnp.dtype(run.train.dtype).itemsize
    heads = config.num_attention_heads * config.head_dim / ways("act_heads")
    kv = config.num_key_value_heads * config.head_dim / ways("act_kv_heads")
    inner = config.intermediate_size / ways("act_mlp")
    per_token = {
        "offload": -residual / tokens,
        "block": 0.0,
        "attention": heads,
        "dots": heads + 2 * kv + 2 * inner + config.hidden_size,
        "none": 2 * heads + 2 * kv + 2 * inner + residual / tokens,
    }[run.train.remat]
    return (residual + tokens * per_token) * itemsize


def _local(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
