"""Log-probabilities of targets a piece of the vocabulary at a time: for heads that are gathered, or whose gradient is summed.

    head [embed / fsdp, vocab]  -->  scan over pieces:  gather [embed, piece], logits [batch, seq, piece], their log-sum-exp
    log-sum-exp of the row      =    log-sum-exp over pieces;  a target's logit lies in one of them

`head_loss` cuts rows into chunks of tokens, each of which sees the whole head. Where the head is spread over devices, that
would gather it once for every chunk, or hold it whole, and sum its gradient as often. Here every part of the head is gathered
once forward and once backward, its gradient is scattered once, and neither the head nor its gradient is ever whole on a device.
Logits are formed again in the backward pass (`jax.checkpoint`), as everything else of a block is.
"""

import jax
import jax.numpy as jnp

from llmtune.sharding import parts, spec
from llmtune.weights.contract import contract
from llmtune.weights.gather import gather_to_multiply

LOGITS = 2**28  # bytes of the float32 logits that a device holds at a time
LANES = 128  # a piece is a multiple of it where the vocabulary allows
HIDDEN = -1e30  # the logit of a column that only fills up the last piece


def vocabulary_loss(
    hidden: jax.Array, w: jax.Array, targets: jax.Array, *, chunk: int, layout: str
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each target, log-sum-exp of its logits), float32 [batch, seq].

    hidden [batch, seq, embed]; w [embed, vocab] with layout "io", [vocab, embed] with "oi"; targets int32 [batch, seq].
    `chunk`: no more logits are held than of so many tokens of each row, nor more than LOGITS bytes.
    """
    (batch, seq, _), axis = hidden.shape, layout.index("o")
    vocab, ways = w.shape[axis], parts("vocab")
    tokens = batch // parts("batch") * (seq // parts("seq"))
    width = vocab // ways  # columns of one device, cut into `pieces` of `size`
    pieces = number_of_pieces(width, min(LOGITS // (4 * tokens), width * chunk // seq))
    size = size_of_pieces(width, pieces)
    stored = _columns_of_devices(w, axis, ways, pieces * size)
    first = (jnp.arange(ways, dtype=jnp.int32) * width)[:, None]
    wide = hidden.astype(jnp.float32)  # its gradient is added up over the pieces in float32

    def piece(wide: jax.Array, stored: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = _piece(stored, axis, number, size)
        x = wide.astype(hidden.dtype)
        logits = contract(x, gather_to_multiply(own, x, x.dtype), layout, ("batch", "seq", "act_vocab"))
        logits = logits.astype(jnp.float32)
        place = number * size + jnp.arange(size, dtype=jnp.int32)
        column = jax.lax.reshape(first + place, (ways * size,), out_sharding=spec("act_vocab"))
        filler = jax.lax.reshape(
            jnp.broadcast_to(place >= width, (ways, size)), (ways * size,), out_sharding=spec("act_vocab")
        )
        logits = jnp.where(filler, HIDDEN, logits)
        hit = column == targets[..., None]
        return jax.nn.logsumexp(logits, axis=-1), jnp.where(hit & ~filler, logits, 0.0).sum(axis=-1)

    again = jax.checkpoint(piece, prevent_cse=False)
    _, (sums, hits) = jax.lax.scan(
        lambda _, number: (None, again(wide, stored, number)), None, jnp.arange(pieces, dtype=jnp.int32)
    )
    total = jax.nn.logsumexp(sums, axis=0)
    return hits.sum(axis=0) - total, total


def number_of_pieces(width: int, most: int) -> int:
    """Into how many pieces to cut so many columns, each of at most `most`: one that divides them evenly, where there is one."""
    least = max(1, -(-width // max(1, most)))
    even = [n for n in range(least, min(width, 2 * least) + 1) if width % n == 0]
    aligned = [n for n in even if width // n % LANES == 0]
    return (aligned or even or [least])[0]


def size_of_pieces(width: int, pieces: int) -> int:
    """Columns of a piece, filled up to a multiple of LANES: of other widths the TPU compiler does not scatter the gradient."""
    size = -(-width // pieces)
    return size if size < LANES else -(-size // LANES) * LANES


def _columns_of_devices(w: jax.Array, axis: int, ways: int, padded: int) -> jax.Array:
    """[embed, vocab] -> [embed, ways, padded]: the columns of each device by themselves, filled up; no data moves."""
    shape: list[int] = list(w.shape)
    axes: list[str | None] = ["embed", "vocab"] if axis == 1 else ["vocab", "embed"]
    shape[axis : axis + 1], axes[axis : axis + 1] = [ways, w.shape[axis] // ways], ["vocab", None]
    cut = jax.lax.reshape(w, tuple(shape), out_sharding=spec(*axes))
    extra = padded - shape[axis + 1]
    return jnp.pad(cut, [(0, extra if n == axis + 1 else 0) for n in range(3)]) if extra else cut


def _piece(stored: jax.Array, axis: int, number: jax.Array, size: int) -> jax.Array:
    """Piece `number` of every device's columns, [embed, ways * size] or its transpose."""
    own = jax.lax.dynamic_slice_in_dim(stored, number * size, size, axis=axis + 1)
    shape = list(own.shape)
    shape[axis : axis + 2] = [own.shape[axis] * size]
    return jax.lax.reshape(
        own, tuple(shape), out_sharding=spec(*(("embed", "vocab") if axis == 1 else ("vocab", "embed")))
    )
