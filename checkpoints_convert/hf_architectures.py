"""What tells the architectures' config.json apart: what an absent field means, and which fields each has.

The defaults are those of transformers' configuration classes: a file leaves out what equals them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints_convert.hf_fields import coefficient, positive, short, wrong
from llmtune.models.config import Experts

FULL, SLIDING = "full_attention", "sliding_attention"
MULTIMODAL, MULTIMODAL_TYPE = "Mistral3ForConditionalGeneration", "mistral3"
INNER = ("mistral", "ministral", "ministral3")  # what the text_config of a multimodal model may be
Windows = tuple[int | None, ...]


@dataclass(frozen=True)
class Architecture:
    """`kv_heads`, `eps`, `positions`, `theta`, `window`, `head_dim`: where the file has no such field (None: derived)."""

    name: str
    model_type: str
    eps: float = 1e-6
    positions: int = 131072
    theta: float = 10_000.0
    kv_heads: int | None = 8
    head_dim: int | None = None
    window: int | None = None
    biases: bool = False
    windows: bool = True
    layer_types: bool = False
    scales_queries: bool = False
    experts: bool = False


ARCHITECTURES = {
    own.name: own
    for own in (
        Architecture("LlamaForCausalLM", "llama", positions=2048, kv_heads=None, biases=True, windows=False),
        Architecture("MistralForCausalLM", "mistral", window=4096),
        Architecture("MinistralForCausalLM", "ministral", window=4096, layer_types=True),
        Architecture(
            "Ministral3ForCausalLM", "ministral3", eps=1e-5, positions=262144, head_dim=128, scales_queries=True
        ),
        Architecture("MixtralForCausalLM", "mixtral", eps=1e-5, theta=1e6, experts=True),
    )
}
BY_TYPE = {own.model_type: own for own in ARCHITECTURES.values()}


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """By `architectures`, or `model_type` where that is absent; refused where the two disagree."""
    kind = config.get("model_type")
    names = config.get("architectures")
    if not names:
        names = [BY_TYPE[kind].name] if isinstance(kind, str) and kind in BY_TYPE else [kind]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
        raise wrong(where, "architectures", names, f"one of {', '.join([*ARCHITECTURES, MULTIMODAL])}")
    own = ARCHITECTURES[names[0]]
    if kind is not None and kind != own.model_type:
        raise wrong(where, "model_type", kind, f"that of {own.name}, {own.model_type}")
    return own


def parse_windows(config: Mapping[str, Any], own: Architecture, layers: int, where: str) -> Windows:
    """The sliding windows of the layers, as the shortest pattern that repeats."""
    window = config.get("sliding_window", own.window)
    if window is not None:
        if not own.windows:
            raise wrong(where, "sliding_window", window, f"null: transformers' {own.name} has no window")
        window = positive(config, "sliding_window", where, own.window)
    types = config.get("layer_types")
    if types is None:
        return (window,)
    meanings = {FULL: None, SLIDING: window}
    if not isinstance(types, list) or not all(isinstance(kind, str) and kind in meanings for kind in types):
        raise wrong(where, "layer_types", types, f"a list of {FULL} and {SLIDING}")
    if len(types) != layers:
        raise wrong(where, "layer_types", types, f"one of {FULL} and {SLIDING} for each of {layers} layers")
    if SLIDING in types and window is None:
        raise wrong(where, "sliding_window", None, f"a number of tokens: layer_types has {SLIDING}")
    if not own.layer_types and {meanings[kind] for kind in types} != {window}:
        raise wrong(
            where, "layer_types", types,
            f"the same in all layers: {own.name} ignores it in transformers (MinistralForCausalLM does not)",
        )  # fmt: skip
    return _period([meanings[kind] for kind in types])


def windows_to_hf(windows: Windows, own: Architecture, layers: int) -> dict[str, Any]:
    """`sliding_window`, and `layer_types` in the architecture that has it."""
    if not own.windows:
        return {}
    result: dict[str, Any] = {"sliding_window": next((window for window in windows if window is not None), None)}
    if own.layer_types:
        kinds = [FULL if windows[n % len(windows)] is None else SLIDING for n in range(layers)]
        result["layer_types"] = kinds
    return result


def parse_experts(config: Mapping[str, Any], own: Architecture, where: str) -> Experts | None:
    """The mixture of experts of architectures that are one."""
    if not own.experts:
        return None
    number, chosen = (
        positive(config, name, where, default)
        for name, default in (("num_local_experts", 8), ("num_experts_per_tok", 2))
    )
    if chosen > number:
        raise wrong(where, "num_experts_per_tok", chosen, f"at most num_local_experts {number}")
    return Experts(
        number,
        chosen,
        coefficient(config, "router_aux_loss_coef", where, 0.001),
        coefficient(config, "router_z_loss_coef", where, 0.0),
    )


def experts_to_hf(experts: Experts | None) -> dict[str, Any]:
    """The fields that `parse_experts` reads; the z-loss's only where it is used."""
    if experts is None:
        return {}
    return {name: value for name, value in vars(experts).items() if name != "router_z_loss_coef" or value}


def supported_only(own: Architecture) -> dict[str, tuple[Any, ...]]:
    """Fields of other architectures that change the mathematics -> the values under which they change nothing here."""
    result: dict[str, tuple[Any, ...]] = {}
    if not own.biases:
        result |= {"attention_bias": (False, None), "mlp_bias": (False, None)}
    if not own.experts:
        result |= {"num_local_experts": (None,), "num_experts_per_tok": (None,)}
        result |= {"router_aux_loss_coef": (None,), "router_z_loss_coef": (None,)}
    return result


def text_part(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The part that describes the text decoder: the whole, or `text_config` of a multimodal model with what stands outside."""
    if config.get("model_type") != MULTIMODAL_TYPE and config.get("architectures") != [MULTIMODAL]:
        return config
    for name, expected in (("model_type", MULTIMODAL_TYPE), ("architectures", [MULTIMODAL])):
        if config.get(name, expected) != expected:
            raise wrong(where, name, config[name], f"{short(expected)} beside the other")
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise wrong(where, "text_config", text, f"an object: {MULTIMODAL} is read as its text decoder")
    kind = text.get("model_type", "mistral")
    if not isinstance(kind, str) or kind not in INNER:
        raise wrong(where, "text_config.model_type", kind, f"one of {', '.join(INNER)}")
    ties = {name: part["tie_word_embeddings"] for name, part in (("", config), ("text_config.", text))
            if "tie_word_embeddings" in part}  # fmt: skip
    if len(set(map(repr, ties.values()))) > 1:
        raise wrong(
            where, "text_config.tie_word_embeddings", ties["text_config."], "the same as tie_word_embeddings outside"
        )
    return {**text, "model_type": kind, "architectures": [BY_TYPE[kind].name],
            "tie_word_embeddings": next(iter(ties.values()), False)}  # fmt: skip


def _period(windows: list[int | None]) -> Windows:
    size = next(p for p in range(1, len(windows) + 1) if all(w == windows[n % p] for n, w in enumerate(windows)))
    return tuple(windows[:size])
