"""A decoder bound to its weights: the small frozen record that objectives, evaluation and generation see.

    bind = functools.partial(LanguageModel, graphdef, dtype=..., remat=...)
    model = bind(combine(trainable, frozen))
    model.hidden(tokens, positions, segment_ids)        -> (hidden [batch, seq, hidden], aux)
    model.token_log_probs(..., targets)                 -> (log_probs [batch, seq], log_sum_exp [batch, seq], aux)
    model.logits(...)                                   -> float32 [batch, seq, vocab]
    model.reference                                     the same record with other weights, or None

Rows are int32 [batch, seq]; segment_ids: 0 is padding, 1.. are documents, tokens see their own document only. Where the model
has virtual tokens, each row holds one document; they are put before it and left out of what comes back.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmtune.kernels import AttentionDropout, Mask, attention
from llmtune.models.attention import Attend, Layer
from llmtune.models.decoder import Decoder, Params, Remat
from llmtune.models.moe import routing_losses
from llmtune.weights import head_loss, linear

Aux = dict[
    str, jax.Array
]  # of a mixture of experts: `penalty`, to be added to the mean loss, and its parts; else empty


@dataclass(frozen=True)
class LanguageModel:
    """`dtype`: of activations and matmuls; `head_chunk`: tokens of a row whose logits are held at a time.

    `packed`: False promises that each row is one document followed by padding (`kernels.Mask`).
    """

    graphdef: Any
    params: Params
    dtype: Any = jnp.float32
    remat: Remat = lambda block: block
    head_chunk: int = 512
    packed: bool = True
    reference: "LanguageModel | None" = None

    def decoder(self) -> Decoder:
        """The Flax module with these weights in place."""
        return nnx.merge(self.graphdef, self.params)

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        """Hidden states after the last norm. `key` is for dropout, where a weight has any."""
        del key
        decoder, counted = self.decoder(), (segment_ids > 0).astype(jnp.float32)
        virtual = decoder.virtual_tokens()
        if virtual:
            tokens, positions, segment_ids, counted = _with_room(virtual, tokens, positions, segment_ids, counted)
        attend = attend_within_row(segment_ids, self.packed, decoder.attention_dropout.get_value())
        hidden, _, sums = decoder.hidden(tokens, positions, attend, counted=counted, dtype=self.dtype, remat=self.remat)
        hidden = hidden[:, virtual:] if virtual else hidden
        experts = decoder.config.experts
        return hidden, {} if experts is None else routing_losses(sums, experts)

    def token_log_probs(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        targets: jax.Array,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Aux]:
        """float32 log-probability of each target under the logits at its place, and their log-sum-exp."""
        hidden, aux = self.hidden(tokens, positions, segment_ids, key)
        log_probs, totals = head_loss(hidden, self.decoder().head_weight(), targets, chunk=self.head_chunk)
        return log_probs, totals, aux

    def logits(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """float32 [batch, seq, vocab]: for evaluation of short rows; training goes through `token_log_probs`."""
        hidden, _ = self.hidden(tokens, positions, segment_ids)
        return self.head_logits(hidden)

    def head_logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [batch, seq, vocab] of hidden states."""
        return linear(hidden, self.decoder().head_weight(), ("batch", "seq", "act_vocab")).astype(jnp.float32)


def _with_room(
    number: int, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, counted: jax.Array
) -> tuple[jax.Array, ...]:
    """The rows [batch, number + seq], with places for virtual tokens before their document; their routing does not count."""
    front = ((0, 0), (number, 0))
    index = jnp.arange(number + tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(index < number, index, jnp.pad(positions + number, front))
    segment_ids = jnp.where(index < number, segment_ids.max(axis=1, keepdims=True), jnp.pad(segment_ids, front))
    return jnp.pad(tokens, front), positions, segment_ids, jnp.pad(counted, front)


def attend_within_row(segment_ids: jax.Array, packed: bool = True, dropout: AttentionDropout | None = None) -> Attend:
    """Causal attention over whole rows, each token within its own document and its layer's window."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, cache: Any) -> tuple[jax.Array, Any]:
        scale, mask = q.shape[-1] ** -0.5, Mask(causal=True, window=layer.window, packed=packed)
        drops = None if dropout is None else dropout.of_layer(layer.slot, layer.index)
        return attention(q, k, v, mask=mask, segments=segment_ids, scale=scale, dropout=drops), cache

    return attend
