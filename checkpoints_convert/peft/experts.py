"""LoRA on experts as transformers 5 holds them, all of a layer in one fused parameter (PEFT's `target_parameters`).

    mlp.experts.gate_up_proj [E, 2 inner, hidden], rank r     ours: experts/gate and experts/up [E, hidden, inner]
      A [E r, hidden]    expert by expert                       gate.a = up.a = A_e.T
      B [2 inner, r E]   experts innermost                      gate.b, up.b = the halves of B_e.T
    mlp.experts.down_proj [E, hidden, inner]                  ours: experts/down [E, inner, hidden]

Where both are adapted, peft nests them: down's tensors are `experts.lora_A`, gate_up's `experts.base_layer.lora_A`. Here gate and
up train apart, so that their a may differ: then the fused pair has the rank of both together, in diagonal blocks.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from checkpoints_convert.hf_names import SEGMENT
from checkpoints_convert.peft.factors import Factors, Pair, check_pair
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

GATE, UP, DOWN = (f"{SEGMENT}/mlp/experts/{name}/kernel" for name in ("gate", "up", "down"))
PARAMETERS = ("gate_up_proj", "down_proj")


class Fused(NamedTuple):
    """One fused parameter of one layer: factors A [E, rank, in], B [E, out, rank], and their scale."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def split_fused(where: object, module: str, pair: Pair, config: ModelConfig) -> tuple[str, np.ndarray, np.ndarray]:
    """(`gate_up_proj` or `down_proj`, A [E, rank, in], B [E, out, rank]), told apart by shape."""
    assert config.experts is not None
    number, hidden, inner = config.experts.num_local_experts, config.hidden_size, config.intermediate_size
    name = "gate_up_proj" if pair.b.shape[:1] == (2 * inner,) and pair.a.shape[1:] == (hidden,) else "down_proj"
    shape = (2 * inner, hidden) if name == "gate_up_proj" else (hidden, inner)
    check_pair(where, f"{module}.{name}", pair, shape)
    rank = pair.a.shape[0] // number
    if rank * number != pair.a.shape[0]:
        raise LlmtuneFormatError(
            f"{where}: {module} has factors of {pair.a.shape[0]} rows for {number} experts; the adapter was made for another base"
        )
    a = pair.a.reshape(number, rank, shape[1])
    b = pair.b.reshape(shape[0], rank, number).transpose(2, 0, 1)
    return name, a, b


def to_weights(fused: Mapping[tuple[int, str], Fused], config: ModelConfig) -> dict[str, Factors]:
    """{(layer, parameter): fused} -> factors by our paths, padded where layers lack one or have a smaller rank."""
    found = {}
    for parameter, paths in (("gate_up_proj", (GATE, UP)), ("down_proj", (DOWN,))):
        own = {layer: one for (layer, name), one in fused.items() if name == parameter}
        for part, path in enumerate(paths) if own else ():
            found[path] = _stack(own, part, len(paths), config.num_hidden_layers)
    return found


def _stack(own: Mapping[int, Fused], part: int, parts: int, depth: int) -> Factors:
    number, _, n_in = next(iter(own.values())).a.shape
    out = next(iter(own.values())).b.shape[1] // parts
    ranks = tuple(own[layer].a.shape[1] if layer in own else 0 for layer in range(depth))
    a = np.zeros((depth, number, n_in, max(ranks)), np.float32)
    b = np.zeros((depth, number, max(ranks), out), np.float32)
    scale = np.zeros((depth, number), np.float32)
    for layer, fused in own.items():
        rank = ranks[layer]
        a[layer, :, :, :rank] = fused.a.swapaxes(1, 2)
        b[layer, :, :rank] = fused.b[:, part * out : (part + 1) * out].swapaxes(1, 2)
        scale[layer] = fused.scale
    return Factors(a, b, scale, None if set(ranks) == {max(ranks)} else ranks)


def to_fused(factors: Mapping[str, Factors]) -> dict[tuple[int, str], Fused]:
    """The inverse of `to_weights`. All experts of a layer share a scale."""
    fused = {}
    gate, up, down = (factors.get(path) for path in (GATE, UP, DOWN))
    for layer in range(len(down.scale) if down is not None else 0):
        assert down is not None
        one = _of_layer(down, layer)
        if one is not None:
            fused[layer, "down_proj"] = one
    first = gate if gate is not None else up
    for layer in range(len(first.scale) if first is not None else 0):
        halves = [None if own is None else _of_layer(own, layer) for own in (gate, up)]
        joined = _join(halves, first)  # type: ignore[arg-type]
        if joined is not None:
            fused[layer, "gate_up_proj"] = joined
    return fused


def _of_layer(own: Factors, layer: int) -> Fused | None:
    rank = own.a.shape[-1] if own.ranks is None else own.ranks[layer]
    if rank == 0:
        return None
    return Fused(
        own.a[layer, :, :, :rank].swapaxes(1, 2), own.b[layer, :, :rank].swapaxes(1, 2), float(own.scale[layer, 0])
    )


def _join(halves: list[Fused | None], like: Factors) -> Fused | None:
    """Gate's and up's factors as those of [gate; up]: of one rank where they share A, else of both ranks."""
    inner = like.b.shape[-1]
    present = [half for half in halves if half is not None]
    if not present:
        return None
    gate, up = halves
    if gate is not None and up is not None and gate.scale == up.scale and np.array_equal(gate.a, up.a):
        return Fused(gate.a, np.concatenate([gate.b, up.b], axis=1), gate.scale)
    scale, blocks = present[0].scale, []
    for place, half in enumerate(halves):
        if half is not None:
            empty = np.zeros((len(half.b), inner, half.b.shape[-1]), np.float32)
            scaled = half.b * np.float32(half.scale / scale)
            blocks.append(np.concatenate([scaled, empty] if place == 0 else [empty, scaled], axis=1))
    return Fused(np.concatenate([half.a for half in present], axis=1), np.concatenate(blocks, axis=2), scale)


def fused_pair(fused: Fused) -> Pair:
    """As peft stores it: A expert by expert, B with experts innermost."""
    number, rank, n_in = fused.a.shape
    b = fused.b.transpose(1, 2, 0).reshape(fused.b.shape[1], rank * number)
    return Pair(fused.a.reshape(number * rank, n_in), b)
