"""LoftQ: codes and factors found together, so that the adapted model begins near the 16-bit one (Li et al. 2023).

    {"q": {"kernel": W}}   -->   {"q": {"kernel": LoRA(Q, a, b, scale)}}        Q + scale a b ~ W, where NF4 alone is Q ~ W

Alternating, as algorithm 1 of arXiv:2310.08659 has it: quantise what the factors leave of W, then take the largest singular
values of what the codes leave of it.

    loftq       on arrays: it needs the 16-bit matrices in memory
    approach    for a base that was encoded while it loaded: W is read again, a matrix at a time

The codes of one alternation are those of W itself: the base is the quantised base that everybody has, and what is exported is a
plain adapter for it. More alternations change the codes, and the adapter stands on a base of its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms.low_rank import LowRank, declare_factors, plan, wrap
from llmtune.transforms.select import weights_by_path
from llmtune.transforms.transform import Params, Transform
from llmtune.weights import FORMATS, ArraySpec, LoRA, Quantized, is_operator

Found = tuple[Quantized, jax.Array, jax.Array]
Stored = Callable[
    [str, tuple[int, ...]], np.ndarray
]  # (path, place in the stack) -> the matrix [in, out] as it is stored


def loftq(
    base: str, *, rank: int, alpha: float, targets: str | Sequence[str] = "all-linear", iterations: int = 1
) -> Transform:
    """`base`: nf4, int4, int8 or fp8. More iterations rarely pay beyond 5."""
    if base not in FORMATS:
        raise LlmtuneConfigError(f"loftq: {base!r} is no format; there are {', '.join(FORMATS)}")
    if iterations < 1:
        raise LlmtuneConfigError(f"loftq: {iterations} iterations; 1 or more are needed")
    form = FORMATS[base]

    def init(declared: Params) -> dict[str, Any]:
        plans, weights = plan(declared, LowRank(rank, alpha, targets)), weights_by_path(declared)
        return {
            path: declare_factors(path, _stored(path, weights[path]), rank, own.scale) for path, own in plans.items()
        }

    def apply(params: Params, additions: Mapping[str, Any]) -> Params:
        return wrap(params, additions, lambda path, weight, own: LoRA(form(_stored(path, weight)), **own))

    def build(params: Params, additions: Mapping[str, Any]) -> Params:
        def make(path: str, weight: jax.Array, own: Mapping[str, Any]) -> LoRA:
            del path
            codes, a, b = _begin(form(ArraySpec(weight.shape, (None,) * weight.ndim)), weight, own, rank, iterations)
            return LoRA(codes, a, b, own["scale"])

        return wrap(params, additions, make)

    return Transform(init, apply, build)


def require_codes(weights: Mapping[str, Any]) -> None:
    """Raise LlmtuneConfigError naming the first weight that is not quantised: nothing is lacking there."""
    for path, weight in weights.items():
        if not isinstance(weight, Quantized):
            raise LlmtuneConfigError(
                f"adapt.initial: loftq makes up for codes, and {path} is not quantised; add it to quantize.targets, or leave it "
                "out of adapt.targets"
            )


def approach(
    params: Params, additions: Mapping[str, Any], stored: Stored, iterations: int = 1
) -> tuple[Params, dict[str, Any]]:
    """Codes and factors that come nearer to the stored matrices; a scale of zero leaves a matrix as it is.

    The codes in `params` are used up: the new ones lie in their memory.
    """
    weights, codes, found = weights_by_path(params), {}, {}
    for path, own in additions.items():
        scale, held = own["scale"], (weights[path], jnp.copy(own["a"]), jnp.copy(own["b"]))
        layouts = jax.tree.map(_spec, held)
        insert = _inserter(jax.tree.structure(layouts), tuple(jax.tree.leaves(layouts)), own["a"].shape[-1], iterations)
        for place in np.ndindex(scale.shape):
            matrix = stored(path, place).astype(np.float32)
            held = insert(held, scale, matrix, np.asarray(place, np.int32))
        codes[path], found[path] = held[0], {**own, "a": held[1], "b": held[2]}
    return wrap(params, codes, lambda path, weight, own: own), found


@functools.lru_cache(maxsize=64)
def _inserter(kind: Any, layouts: tuple[Any, ...], rank: int, iterations: int) -> Callable[..., Found]:
    """((codes, a, b), scale, matrix, place) -> the three with what is found for that one matrix in place, in the same memory."""

    def insert(held: Found, scale: Any, matrix: Any, place: Any) -> Found:
        at = tuple(place[n] for n in range(scale.ndim))
        (one, *_), share = jax.tree.map(lambda leaf: leaf[at], held), scale[at]
        codes, (first, second) = one, _largest(matrix - one.decode_one(), rank)
        for _ in range(iterations - 1):
            codes = one.encode_one(matrix - jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST))
            first, second = _largest(matrix - codes.decode_one(), rank)
        codes = jax.tree.map(lambda old, new: jnp.where(share == 0, old, new), one, codes)
        root = jnp.where(share == 0, 0.0, jax.lax.rsqrt(jnp.where(share == 0, 1.0, share)))
        return jax.tree.map(lambda leaf, new: leaf.at[at].set(new), held, (codes, first * root, second * root))

    placed = jax.sharding.auto_axes(insert, out_sharding=jax.tree.unflatten(kind, layouts))  # type: ignore[reportCallIssue]
    return jax.jit(placed, donate_argnums=0)


def _largest(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The largest singular values of [in, out], shared evenly: [in, rank], [rank, out]."""
    u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _stored(path: str, weight: Any) -> Any:
    if is_operator(weight):
        raise LlmtuneConfigError(f"loftq: {path} is quantised or adapted already; it needs the stored matrix")
    return weight


def _begin(like: Quantized, weight: jax.Array, own: Mapping[str, Any], rank: int, iterations: int) -> Found:
    """Codes and factors of a stack, laid out as its matrix and its factors are."""
    layouts = tuple(jax.typeof(own[name]).sharding.spec for name in ("a", "b"))
    find = functools.partial(alternate, rank=rank, iterations=iterations)
    for _ in range(weight.ndim - 2):
        find = _each(find)
    factors = jax.sharding.auto_axes(functools.partial(find, like.encode_one), out_sharding=(*layouts, _spec(weight)))
    a, b, rest = jax.jit(factors)(weight.astype(jnp.float32), own["scale"])
    return jax.jit(like.encode)(rest), a, b


def alternate(
    encode: Any, w: jax.Array, scale: jax.Array, *, rank: int, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One float32 matrix [in, out] -> a [in, rank], b [rank, out], and the matrix whose codes are the base."""
    rest = w
    for left in reversed(range(iterations)):
        a, b = _largest(w - encode(rest).decode_one(), rank)
        if left:
            rest = w - jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    share = jax.lax.rsqrt(scale)
    return a * share, b * share, rest


def _each(find: Any) -> Any:
    return lambda encode, w, scale: jax.lax.map(lambda pair: find(encode, *pair), (w, scale))


def _spec(weight: jax.Array) -> Any:
    return jax.typeof(weight).sharding.spec
