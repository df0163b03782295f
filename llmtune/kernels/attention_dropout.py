"""Attention dropout: which of the softmax's weights a training step leaves out, as a function of their places alone.

    out = (softmax(scores) * factors) v,      factors 0 with probability `rate`, else 1 / (1 - rate)

    words                                    of a step and a microbatch
    threefry(words, (slot, index))           of a layer
    threefry(that, (row, head))              of a row of the batch and a head of the model
    threefry(that, (query, key))  < limit    of a weight: dropped

Rows, heads, queries and keys are counted over the whole batch, model and row. Every back end, whatever its blocks, and every
mesh, whatever it cuts, therefore drops the same weights, and the backward pass forms them anew instead of keeping [seq, seq].
(Srivastava et al. 2014, JMLR 15, section 4, on the weights of attention as Vaswani et al. 2017 and transformers have it.)
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

Words = tuple[jax.Array, jax.Array]  # uint32, of shapes that broadcast
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(key: Words, counter: Words) -> Words:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3).

    JAX's own primitive wants all its operands in full, and takes ten times as long on a CPU; here XLA forms counters and
    words where they are used.
    """
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x, y = x + schedule[(group + 1) % 3], y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionDropout:
    """What a step says of it: `words` uint32 [2] and the rate, in (0, 1)."""

    words: jax.Array
    rate: float = field(metadata={"static": True})

    def of_layer(self, slot: int, index: jax.Array | int) -> "AttentionDropout":
        """The dropout of one layer: `slot` in the pattern of windows, in its `index`-th repetition."""
        own = threefry((self.words[0], self.words[1]), (jnp.uint32(slot), jnp.asarray(index, jnp.uint32)))
        return replace(self, words=jnp.stack(own))

    def of_rows(self, rows: jax.Array, heads: jax.Array, first: jax.Array | int = 0) -> "Dropped":
        """Of a layer: what a kernel of these rows and heads, uint32 [batch] and [heads], is given."""
        words = threefry((self.words[0], self.words[1]), (rows[:, None], heads[None, :]))
        return Dropped(words, first, self.rate)


def draw_attention_dropout(key: jax.Array, rate: float) -> AttentionDropout:
    """The dropout of one step, from its random key."""
    return AttentionDropout(jax.random.bits(key, (2,), jnp.uint32), rate)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropped:
    """What a kernel is given: uint32 words of each of its rows and heads, [batch, heads], and where its queries begin.

    `first`: the place in the whole row of the kernel's first query, int32 [].
    """

    words: Words
    first: jax.Array | int
    rate: float = field(metadata={"static": True})

    def grouped(self, kv_heads: int) -> "Dropped":
        """The words as [batch, kv_heads, groups]."""
        return replace(self, words=jax.tree.map(lambda own: own.reshape(len(own), kv_heads, -1), self.words))

    def factors(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """float32 [batch, kv_heads, groups, queries, keys], from int32 places counted from the kernel's first query."""
        rows, columns = ((self.first + own).astype(jnp.uint32) for own in (queries, keys))
        x, y = (own[..., None, None] for own in self.words)
        bits, _ = threefry((x, y), (rows[:, None], columns[None, :]))
        limit = jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        # not jnp.where of two constants: spread to this shape they would be kept through a scan over layers
        return (bits >= limit).astype(jnp.float32) * (1.0 / (1.0 - self.rate))


def with_dropped(weights: jax.Array, dropped: Dropped | None, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Weights [batch, kv_heads, groups, queries, keys] with some left out, or as they are; its own transpose."""
    return weights if dropped is None else weights * dropped.factors(queries, keys)
