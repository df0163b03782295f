"""Multimodal checkpoints (Mistral3ForConditionalGeneration): the text tower is loaded, all else is carried through untouched.

    language_model.model.layers.0...   ->  model.language_model.layers.0...     transformers' spelling on disk -> its modules
    language_model.lm_head.weight      ->  lm_head.weight
    vision_tower..., multi_modal_projector...                                   not read; copied as they are on save

Both spellings are read, and each file is written back in its own.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace

from checkpoints_convert.safetensors_reader import WeightDirectory
from checkpoints_convert.safetensors_writer import Entry
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

SPELLINGS = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_tower(weights: WeightDirectory, config: ModelConfig) -> WeightDirectory:
    """The tensors of the text decoder under the names of its modules: all of them, where the model is text alone."""
    if not config.is_text_tower:
        return weights
    tensors = {}
    for stored, info in weights.tensors.items():
        if not stored.startswith(OTHER_TOWERS):
            name = _module_name(stored)
            if name in tensors:
                raise LlmtuneFormatError(f"{info.file}: {stored} stands there in both spellings")
            tensors[name] = replace(info, name=name)
    return WeightDirectory(weights.path, tensors)


def stored_names(names: Iterable[str], source: WeightDirectory | None, config: ModelConfig) -> dict[str, str]:
    """Names of modules -> the names under which the source stores them; themselves where it does not."""
    stored = {} if source is None or not config.is_text_tower else {_module_name(n): n for n in source.tensors}
    return {name: stored.get(name, name) for name in names}


def carried(source: WeightDirectory | None, config: ModelConfig) -> list[Entry]:
    """The tensors of the other towers, to be written as they are."""
    if source is None or not config.is_text_tower:
        return []
    others = {name: info for name, info in source.tensors.items() if name.startswith(OTHER_TOWERS)}
    return [Entry(n, info.dtype, info.shape, functools.partial(source.read, n)) for n, info in others.items()]


def _module_name(stored: str) -> str:
    for old, new in SPELLINGS:
        if stored.startswith(old):
            return new + stored.removeprefix(old)
    return stored
