"""Attention in blocks beside naive attention on one row: the same numbers, memory linear in the length, a window that pays.

    python -m benchmarks.attention                        on this machine's CPU, float32, forward and backward
    python -m benchmarks.attention --heads 8 --pairs 9

Naive is `jax.nn.dot_product_attention(implementation="xla")` with the mask spelled out, [seq, seq] per head. Memory is the
compiler's: the temporary buffers of the compiled program, without arguments and results. Times are of neighbours: causal and
windowed attention run in turn, and the ratio is the median of the pairs.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.kernels import Mask, visible
from llmtune.kernels.blocked_attention import blocked_attention

LENGTHS = (2048, 4096, 8192, 16384)
LONG = 8192
WINDOW = 1024


def naive_attention(q: Any, k: Any, v: Any, segments: Any, *, mask: Mask, scale: float) -> jax.Array:
    """JAX's own attention with the whole mask in view; a token that sees nothing gets zeros, as in ours."""
    index = jnp.arange(q.shape[1])
    seen = visible(mask, index, index, segments, segments)
    out = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale, implementation="xla")
    return jnp.where(segments[:, :, None, None] > 0, out, 0.0)


def row(seq: int, heads: int, kv_heads: int, size: int) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and segment ids of one row that holds two documents and a little padding."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, seq, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.where(np.arange(seq) < seq * 5 // 8, 1, np.where(np.arange(seq) < seq - 7, 2, 0))
    return q, k, v, segments[None].astype(np.int32)


def compiled(
    form: Any, arrays: tuple[np.ndarray, ...], window: int | None, *, backward: bool = True, layers: int = 1
) -> Any:
    """The program of the result, and of the gradients of the sum of its squares, for these shapes.

    Layers are scanned, as in a model; each attends with the result of the one before as its queries.
    """
    attend = functools.partial(form, mask=Mask(window=window), scale=arrays[0].shape[-1] ** -0.5)

    def loss(q: Any, k: Any, v: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        out, _ = jax.lax.scan(lambda q, _: (attend(q, k, v, segments), None), q, None, length=layers)
        return (out * out).sum(), out

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True) if backward else loss
    return jax.jit(run).lower(*arrays).compile()


def temporary_bytes(form: Any, seq: int, heads: int, kv_heads: int, size: int, window: int | None = None) -> int:
    """Peak bytes of the buffers that forward and backward of two layers need beside their arguments and results."""
    return compiled(form, row(seq, heads, kv_heads, size), window, layers=2).memory_analysis().temp_size_in_bytes


def seconds(program: Any, arrays: tuple[np.ndarray, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - start


def largest_difference(seq: int, window: int | None, shape: tuple[int, int, int]) -> list[float]:
    """Of the result and of the gradients of q, k and v, between blocks and naive: largest |difference| / largest |value|."""
    arrays = row(seq, *shape)
    found = []
    for form in (blocked_attention, naive_attention):
        (_, out), gradients = compiled(form, arrays, window)(*arrays)
        found.append([np.asarray(x) for x in (out, *gradients)])
    return [float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of measurements")
    own = parser.parse_args()
    shape = (own.heads, own.kv_heads, own.size)
    print(
        f"one row, {own.heads} heads and {own.kv_heads} key heads of {own.size}, float32, {jax.devices()[0].device_kind}"
    )
    for window in (None, WINDOW):
        differences = "  ".join(f"{x:.1e}" for x in largest_difference(LONG, window, shape))
        print(
            f"blocks against naive, {LONG} tokens, window {window}: out, dq, dk, dv differ by  {differences}",
            flush=True,
        )
    for seq in LENGTHS:
        ours, theirs = (temporary_bytes(form, seq, *shape) for form in (blocked_attention, naive_attention))
        print(
            f"{seq:6d} tokens: temporary memory of two layers {ours / 1e6:9.1f} MB in blocks, {theirs / 1e6:9.1f} MB naive",
            flush=True,
        )
    arrays = row(LONG, *shape)
    for backward, what in ((False, "forward"), (True, "forward and backward")):
        programs = [compiled(blocked_attention, arrays, window, backward=backward) for window in (None, WINDOW)]
        for program in programs:
            seconds(program, arrays)
        pairs = [[seconds(program, arrays) for program in programs] for _ in range(own.pairs)]
        ratios = [causal / windowed for causal, windowed in pairs]
        causal, windowed = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(
            f"{what}, {LONG} tokens: causal {causal:.3f} s, window {WINDOW} {windowed:.3f} s, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {own.pairs} pairs)",
            flush=True,
        )


if __name__ == "__main__":
    main()
