"""Arithmetic on low-rank adapters: several become one, on the host, a matrix at a time.

    cat      the weighted sum itself: factors side by side, of all ranks together
    svd      its best approximation of a given rank (Eckart and Young 1936), found without forming the matrix
    linear   the weighted sum of the factors (not of their products), as peft has it
    ties     small values trimmed, signs elected, then the mean of those that agree (Yadav et al. 2023, arXiv:2306.01708)
    dare     values dropped at random and the rest rescaled, then summed (Yu et al. 2024, arXiv:2311.03099)

`ties` and `dare` work on the factors as `linear` does, or (`ties_svd`, `dare_svd`) on the products, of which `svd` follows.
The result's scale is one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms.lora import Factors

Merge = Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray]  # (tensors, weights) -> one tensor


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix: a [in, rank], b [rank, out] and a scale; float64."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def product(self) -> np.ndarray:
        """Scale * a @ b."""
        return self.scale * (self.a @ self.b)


def cat(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """The weighted sum, exactly; its rank is that of all together."""
    a = np.concatenate([own.a * (own.scale * weight) for own, weight in zip(matrices, weights, strict=True)], axis=1)
    return Matrix(a, np.concatenate([own.b for own in matrices]), 1.0)


def truncate(matrix: Matrix, rank: int) -> Matrix:
    """The nearest matrix of this rank (or of its own, if smaller), by a decomposition as small as the factors are narrow."""
    left, inner_left = np.linalg.qr(matrix.a)
    right, inner_right = np.linalg.qr(matrix.b.T)
    u, values, v = np.linalg.svd(matrix.scale * (inner_left @ inner_right.T))
    return Matrix((left @ u)[:, :rank] * values[:rank], (v @ right.T)[:rank], 1.0)


def of_dense(delta: np.ndarray, rank: int) -> Matrix:
    """The nearest matrix of this rank."""
    u, values, v = np.linalg.svd(delta, full_matrices=False)
    return Matrix(u[:, :rank] * values[:rank], v[:rank], 1.0)


def on_factors(merge: Merge) -> Callable[[Sequence[Matrix], Sequence[float]], Matrix]:
    """`merge` on a and on b, each weighted by the root of weight and scale; a carries the sign."""

    def of_matrices(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        if len({own.a.shape[1] for own in matrices}) > 1:
            raise LlmtuneConfigError("combine: the adapters differ in rank, which this way needs equal; use cat or svd")
        scaled = [weight * own.scale for own, weight in zip(matrices, weights, strict=True)]
        roots = [math.sqrt(abs(own)) for own in scaled]
        signed = [math.copysign(root, own) for root, own in zip(roots, scaled, strict=True)]
        return Matrix(merge([m.a for m in matrices], signed), merge([m.b for m in matrices], roots), 1.0)

    return of_matrices


def linear(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted sum."""
    return sum(weight * own for own, weight in zip(tensors, weights, strict=True))  # type: ignore[return-value]


def ties(density: float) -> Merge:
    """Keep the largest `density` of each, elect each place's sign by the sum, and average those that agree with it."""

    def merge(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
        kept = np.stack([_trim(own, density) for own in tensors])
        elected = np.where(kept.sum(axis=0) >= 0, 1, -1)
        agrees = np.sign(kept) == elected
        weighted = kept * np.reshape(weights, (-1, *[1] * (kept.ndim - 1)))
        return (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)

    return merge


def dare(density: float, random: np.random.Generator) -> Merge:
    """Keep each value with probability `density`, divided by it; then the weighted sum."""

    def merge(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
        return linear([own * (random.random(own.shape) < density) / density for own in tensors], weights)

    return merge


COMBINATIONS = ("cat", "svd", "linear", "ties", "dare", "ties_svd", "dare_svd")


def combine_adapters(
    adapters: Sequence[Mapping[str, Factors]],
    weights: Sequence[float],
    how: str,
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Factors]:
    """One adapter of several, by path. `rank`: of what `svd` leaves (None: the largest given); a weight for each adapter.

    A matrix that only some adapt is combined of those.
    """
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise LlmtuneConfigError(
            f"combine: {len(weights)} weights for {len(adapters)} adapters; give a number for each"
        )
    if not 0 < density <= 1:
        raise LlmtuneConfigError(f"combine: a density of {density} must lie in (0, 1]")
    random = np.random.default_rng(seed)
    by_name = {"linear": linear, "ties": ties(density), "dare": dare(density, random)}

    def of_matrices(matrices: Sequence[Matrix], own: Sequence[float]) -> Matrix:
        widest = rank or max(matrix.a.shape[1] for matrix in matrices)
        if how == "cat":
            return cat(matrices, own)
        if how == "svd":
            return truncate(cat(matrices, own), widest)
        merge = by_name[how.removesuffix("_svd")]
        if how.endswith("_svd"):
            return of_dense(merge([matrix.product for matrix in matrices], own), widest)
        return on_factors(merge)(matrices, own)

    return {
        path: _combine(
            [(own[path], weight) for own, weight in zip(adapters, weights, strict=True) if path in own], of_matrices
        )
        for path in dict.fromkeys(path for adapter in adapters for path in adapter)
    }


def change_rank(factors: Factors, rank: int, scale: float) -> Factors:
    """The same adapter with this rank and scale in all layers: wider by zeros, or narrower by the nearest matrix of that rank."""

    def resize(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        matrix = cat(matrices, weights)
        matrix = truncate(matrix, rank) if matrix.a.shape[1] > rank else matrix
        missing = rank - matrix.a.shape[1]
        return Matrix(np.pad(matrix.a, ((0, 0), (0, missing))), np.pad(matrix.b, ((0, missing), (0, 0))) / scale, scale)

    return _combine([(factors, 1.0)], resize)


def _combine(
    given: Sequence[tuple[Factors, float]], of_matrices: Callable[[Sequence[Matrix], Sequence[float]], Matrix]
) -> Factors:
    """`of_matrices` for every layer (and expert) that any of the adapters has; ranks that differ are padded with zeros."""
    if any(own.magnitude is not None for own, _ in given):
        raise LlmtuneConfigError("combine: a DoRA adapter is not linear in its values; merge it into the model instead")
    shape, results = given[0][0].scale.shape, {}
    for place in np.ndindex(shape):
        present = [(_at(own, place), weight) for own, weight in given if _rank(own, place)]
        if present:
            results[place] = of_matrices(*zip(*present, strict=True))  # type: ignore[arg-type]
    widest = max(own.a.shape[1] for own in results.values())
    (*_, n_in, _), (*_, n_out) = given[0][0].a.shape, given[0][0].b.shape
    a, b = np.zeros((*shape, n_in, widest), np.float32), np.zeros((*shape, widest, n_out), np.float32)
    scale, ranks = np.zeros(shape, np.float32), np.zeros(shape[:1], int)
    for place, own in results.items():
        rank = own.a.shape[1]
        a[(*place, slice(None), slice(rank))], b[(*place, slice(rank))], scale[place] = own.a, own.b, own.scale
        ranks[place[:1]] = max(rank, int(ranks[place[:1]]))
    uneven = bool(shape) and set(ranks.tolist()) != {widest}
    return Factors(a, b, scale, tuple(ranks.tolist()) if uneven else None)


def _rank(factors: Factors, place: tuple[int, ...]) -> int:
    return factors.a.shape[-1] if factors.ranks is None else factors.ranks[place[0]]


def _at(factors: Factors, place: tuple[int, ...]) -> Matrix:
    rank = _rank(factors, place)
    a, b = factors.a[place].astype(np.float64)[:, :rank], factors.b[place].astype(np.float64)[:rank]
    return Matrix(a, b, float(factors.scale[place]))


def _trim(tensor: np.ndarray, density: float) -> np.ndarray:
    kept = int(density * tensor.size)
    if kept == 0:
        return np.zeros_like(tensor)
    order = np.argpartition(np.abs(tensor).ravel(), -kept)[-kept:]
    mask = np.zeros(tensor.size, bool)
    mask[order] = True
    return tensor * mask.reshape(tensor.shape)
