"""The factors of LoRA as our model holds them, and the names under which PEFT stores them.

    model.layers.3.self_attn.q_proj.lora_A.weight  [rank, in]     ->  a[3] = its transpose, [in, rank]
    model.layers.3.self_attn.q_proj.lora_B.weight  [out, rank]    ->  b[3] = its transpose, [rank, out]
    model.layers.3.self_attn.q_proj.lora_magnitude_vector [out]   ->  magnitude[3], of DoRA
    model.embed_tokens.lora_embedding_A            [rank, vocab]  ->  a = its transpose, [vocab, rank]

A weight without layers (the head, the embedding) is no stack: there L is left out.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoints_convert.hf_names import Tensor
from llmtune.errors import LlmtuneFormatError

SIDES = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "m"}
KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.(language_model\.)?(layers\.\d+(\.\w+)+?|embed_tokens)|lm_head)"
    rf"(?P<under>(\.base_layer)*)\.(?P<side>{'|'.join(SIDES)})(\.(?!weight)\w+)?(\.weight)?"
)


@dataclass(frozen=True)
class Factors:
    """One weight's adapter: float32 a [L, in, rank], b [L, rank, out], scale [L]; `ranks` where they differ.

    Of experts: [L, E, ...]. `magnitude` [L, out]: of DoRA, else None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    ranks: tuple[int, ...] | None
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class Pair:
    """One module's tensors as PEFT has them: A [rank, in], B [out, rank], magnitude [out] or None."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


def turned(pair: Pair) -> Pair:
    """The same change of the transposed matrix: (B A)^T = A^T B^T."""
    return Pair(pair.b.T, pair.a.T)


def stack(layers: Sequence[Tensor], pairs: Mapping[str, Pair], scale_of: Callable[[str, int], float]) -> Factors:
    """The pairs of all layers of one weight. Layers without an adapter, or of a smaller rank, are padded with zeros."""
    given = {own.index: pairs[own.name] for own in layers if own.name in pairs}
    places = tuple(last + 1 for last in layers[-1].index)
    out, n_in = layers[0].shape if layers[0].transposed else layers[0].shape[::-1]
    widest = max(pair.a.shape[0] for pair in given.values())
    a = np.zeros((*places, n_in, widest), np.float32)
    b, scale = np.zeros((*places, widest, out), np.float32), np.zeros(places, np.float32)
    magnitude = np.ones((*places, out), np.float32) if any(p.magnitude is not None for p in given.values()) else None
    ranks = np.zeros(places[:1], int)
    for tensor in layers:
        pair = given.get(tensor.index)
        if pair is None:
            continue
        rank = pair.a.shape[0]
        a[(*tensor.index, slice(None), slice(rank))] = pair.a.T
        b[(*tensor.index, slice(rank))] = pair.b.T
        scale[tensor.index] = scale_of(tensor.name.removesuffix(".weight"), rank)
        ranks[tensor.index[:1]] = max(rank, int(ranks[tensor.index[:1]]))
        if magnitude is not None and pair.magnitude is not None:
            magnitude[tensor.index] = pair.magnitude
    uneven = layers[0].layer is not None and set(ranks.tolist()) != {widest}
    return Factors(a, b, scale, tuple(ranks.tolist()) if uneven else None, magnitude)


def unstack(factors: Factors) -> list[tuple[tuple[int, ...], int, Pair, float]]:
    """[(place, rank, pair, scale)] of every matrix that is adapted; the inverse of `stack`."""
    found = []
    for place in np.ndindex(factors.scale.shape):
        rank = factors.a.shape[-1] if factors.ranks is None else factors.ranks[place[0]]
        if rank:
            magnitude = None if factors.magnitude is None else factors.magnitude[place]
            pair = Pair(factors.a[place][:, :rank].T, factors.b[place][:rank].T, magnitude)
            found.append((place, rank, pair, float(factors.scale[place])))
    return found


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """Alpha back from a float32 scale: the shortest decimal that gives this very scale, an int where it is one."""
    divisor = math.sqrt(rank) if rslora else rank
    exact = scale * divisor
    candidates = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    alpha = next((own for own in candidates if np.float32(own / divisor) == np.float32(scale)), exact)
    return int(alpha) if alpha.is_integer() else alpha


def check_pair(where: object, name: str, pair: Pair, shape: tuple[int, int]) -> Pair:
    """The pair, where it fits a base [out, in]."""
    out, n_in = shape
    a, b, m = pair.a.shape, pair.b.shape, None if pair.magnitude is None else pair.magnitude.shape
    if len(a) != 2 or len(b) != 2 or a[1] != n_in or b[0] != out or a[0] != b[1] or m not in (None, (out,)):
        raise LlmtuneFormatError(
            f"{where}: {name} has A {list(a)} and B {list(b)} where the base is [{out}, {n_in}]; "
            "the adapter was made for another base model"
        )
    return pair
