"""What an objective sees of a model: a small record of functions. Objectives differ in nothing else.

An objective is a function `(model, batch) -> (loss sum, weight sum, metrics)`; the train step divides the sums over the whole
global batch, whatever the microbatches, the packing and the hosts.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]  # sums over the batch, divided by the weight sum like the loss


class Model(Protocol):
    """The record; `llmtune.models.language_model.LanguageModel` is one. Rows are int32 [batch, seq]."""

    @property
    def reference(self) -> "Model | None":
        """The same record with adapters off or with another tree; None where unused."""
        ...

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """(hidden [batch, seq, hidden], auxiliary losses: `penalty`, to be added to the mean loss, and its parts)."""
        ...

    def token_log_probs(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        targets: jax.Array,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """(log-probability of each target, log-sum-exp of its logits, auxiliary losses), float32 [batch, seq]."""
        ...

    def head_logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [batch, seq, vocab] of hidden states [batch, seq, hidden]: for pieces of rows, `head_chunk` tokens each."""
        ...

    @property
    def head_chunk(self) -> int:
        """How many tokens' logits should be held at a time."""
        ...

    def logits(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """float32 [batch, seq, vocab]."""
        ...


Objective = Callable[[Model, Batch], tuple[jax.Array, jax.Array, Metrics]]
TokenLosses = Callable[[Model, Batch], tuple[jax.Array, jax.Array]]  # losses and weights, float32 [batch, seq]
