"""Whole weights in a PEFT directory: what `modules_to_save` trained beside the factors.

    base_model.model.model.embed_tokens.weight  [vocab, hidden]   ->  embed/table, in place of the base's
    base_model.model.lm_head.weight             [vocab, hidden]   ->  head/kernel = its transpose

An embedding may be larger or smaller than the base's: then the base was resized before it was adapted. There peft writes
each end three times: so, as `lm_head.modules_to_save.weight`, and as it was before (`lm_head.original_module.weight`).
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints_convert.hf_names import ATTENTION, MLP, ROUTER, SEGMENT, Tensor, root_module, tensors
from checkpoints_convert.safetensors_reader import WeightDirectory
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

HEAD = "lm_head.weight"
KEY = re.compile(
    r"base_model\.model\.(?P<module>model\..+?|lm_head)"
    r"(\.modules_to_save(\.\w+)?|\.base_layer|(?P<before>\.original_module))?\.weight"
)
Fetch = Callable[[str, tuple[int, ...]], np.ndarray]  # (our path, place in the stack) -> as we hold it, on the host


def whole_name(key: str) -> str | None:
    """The Hugging Face name of the weight that a key brings in whole; None for a LoRA factor and anything else."""
    match = KEY.fullmatch(key)
    return None if match is None or ".lora_" in key else f"{match['module']}.weight"


def embedding(config: ModelConfig) -> str:
    """The name of the input embedding, which lies deeper in a multimodal model."""
    return f"{root_module(config)}.embed_tokens.weight"


def vocabulary_size(weights: WeightDirectory, config: ModelConfig) -> int | None:
    """Rows of the embedding or head that the directory brings; None where it brings neither."""
    ends = (embedding(config), HEAD)
    found = {name: weights.tensors[key].shape for name, key in _named(weights).items() if name in ends}
    sizes = {shape[0] if shape else 0 for shape in found.values()}
    if len(sizes) > 1:
        raise LlmtuneFormatError(f"{weights.path}: its embedding and its head differ in size ({sorted(sizes)})")
    if len(found) == 1 and sizes != {config.vocab_size} and not config.tie_word_embeddings:
        raise LlmtuneFormatError(
            f"{weights.path}: it brings {next(iter(found))} of {sizes.pop()} rows for a base of {config.vocab_size}, and not "
            "its other end, which must be resized with it; the adapter was made for another base model, or is incomplete"
        )
    return sizes.pop() if sizes else None


def read_whole(weights: WeightDirectory, config: ModelConfig, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{our path: float32 weight as we hold it}, every shape checked against a base of this configuration."""
    table = {tensor.name: tensor for tensor in tensors(config)}
    found = _named(weights)
    if config.tie_word_embeddings:
        table_name = embedding(config)
        _check_tied(weights, found, settings, table_name)
        found = {table_name if name == HEAD else name: key for name, key in found.items()}
    for name, key in found.items():
        expected = table[name].shape if name in table else None
        if expected is None:
            raise LlmtuneFormatError(
                f"{weights.path}: {key} is a weight of a module that this base model does not have"
            )
        if weights.tensors[key].shape != expected:
            raise LlmtuneFormatError(
                f"{weights.path}: {key} has shape {list(weights.tensors[key].shape)} where the base has {list(expected)}; "
                "the adapter was made for another base model"
            )
    layers: dict[str, list[Tensor]] = {}
    for tensor in table.values():
        layers.setdefault(tensor.path, []).append(tensor)
    paths = dict.fromkeys(table[name].path for name in found)
    return {path: _stack(layers[path], found, weights) for path in paths}


def whole_entries(
    paths: Iterable[str], config: ModelConfig, fetch: Fetch, *, factored: Container[str]
) -> Iterator[Entry]:
    """The tensors to write, float32. A tied embedding is written as the head too, as peft does.

    Under factors of its own (paths in `factored`) a weight is the layer's base.
    """
    chosen = set(paths)
    for tensor in tensors(config):
        if tensor.path in chosen:
            under = ".base_layer.weight" if tensor.path in factored else ".weight"
            yield _entry(tensor.name.replace(".weight", under), tensor, fetch)
            if tensor.name == embedding(config) and config.tie_word_embeddings:
                yield _entry(HEAD.replace(".weight", under), tensor, fetch)


def module_names(paths: Sequence[str]) -> list[str]:
    """What `modules_to_save` says, for peft's rule that a module's name ends with it."""
    own = {"embed/table": "embed_tokens", "head/kernel": "lm_head", "norm/weight": "model.norm"}
    inside = {**ATTENTION, **MLP, **ROUTER}
    blocks = {f"{SEGMENT}/{ours}": theirs.split(".")[-2] for ours, theirs in inside.items()}
    return [{**own, **blocks}[path] for path in paths]


def _named(weights: WeightDirectory) -> dict[str, str]:
    """{Hugging Face name: key}. The same weight under two keys must be the same."""
    found: dict[str, str] = {}
    for key in weights.tensors:
        name, match = whole_name(key), KEY.fullmatch(key)
        if name is None or match is None or match["before"]:
            continue
        if name in found and not np.array_equal(weights.read(found[name]), weights.read(key)):
            raise LlmtuneFormatError(f"{weights.path}: {found[name]} and {key} are one weight, and differ")
        found.setdefault(name, key)
    return found


def _check_tied(
    weights: WeightDirectory, found: Mapping[str, str], settings: Mapping[str, Any], table_name: str
) -> None:
    """One table for both ends, or a refusal: an embedding that trained apart from the head needs an untied base."""
    ends = (table_name, HEAD)
    if all(end in found for end in ends):
        one, other = (weights.read(found[end]) for end in ends)
        if one.shape == other.shape and np.array_equal(one, other):
            return
    elif not found.keys() & set(ends) or settings.get("ensure_weight_tying"):
        return
    raise LlmtuneFormatError(
        f"{weights.path}: it brings {' and '.join(n for n in ends if n in found)} for a base whose head is tied "
        "to its embedding, not the same for both; train it with ensure_weight_tying, or untie the base"
    )


def _stack(layers: Sequence[Tensor], found: Mapping[str, str], weights: WeightDirectory) -> np.ndarray:
    missing = [tensor.name for tensor in layers if tensor.name not in found]
    if missing:
        raise LlmtuneFormatError(
            f"{weights.path}: {missing[0]} is missing; a weight that is brought in whole must be there for every layer"
        )
    parts = [weights.read(found[tensor.name]).astype(np.float32) for tensor in layers]
    parts = [part.T if tensor.transposed else part for part, tensor in zip(parts, layers, strict=True)]
    places = tuple(last + 1 for last in layers[-1].index)  # (), (layers,) or (layers, experts)
    return np.stack(parts).reshape(*places, *parts[0].shape)


def _entry(name: str, tensor: Tensor, fetch: Fetch) -> Entry:
    def produce() -> np.ndarray:
        array = fetch(tensor.path, tensor.index)
        return np.ascontiguousarray(array.T if tensor.transposed else array, dtype=np.float32)

    return Entry(f"base_model.model.{name}", np.dtype(np.float32), tensor.shape, produce)
