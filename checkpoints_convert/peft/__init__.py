"""PEFT adapter directories in and out: a module for each family of methods, a table of them by `peft_type`.

    adapter = read_adapter(directory, config)       what the directory holds, by our paths
    write_adapter(directory, adapter, config)       a directory that peft loads

A family reads its tensors by name into values of its own kind and writes them back; `modules_to_save` is common to all.
To add one: a module with `read` and `write`, and a row in METHODS.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from checkpoints_convert.peft import bottleneck, lora, vectors, virtual, whole
from checkpoints_convert.peft.directory import CONFIG, WEIGHTS, PeftDirectory, open_peft
from checkpoints_convert.peft.forms import ON_EXPERTS, form_of
from checkpoints_convert.safetensors_header import read_header
from checkpoints_convert.safetensors_reader import WeightDirectory
from checkpoints_convert.safetensors_writer import Entry, new_directory, take_part, write_file, write_json
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig


class Method(NamedTuple):
    """`read` gives None where the directory holds no tensor of this method; `write` gives tensors and their settings.

    `adapted`: the paths, of the values, whose weights lie as `base_layer` under the adapter.
    """

    read: Callable[[PeftDirectory, ModelConfig], Any]
    write: Callable[[Any, ModelConfig], tuple[list[Entry], dict[str, Any]]]
    adapted: Callable[[Any], Collection[str]]


METHODS: dict[str, Method] = {
    "LORA": Method(lora.read, lora.write, lambda values: values.factors),
    "IA3": Method(vectors.read_ia3, vectors.write_ia3, lambda values: values),
    "VERA": Method(vectors.read_vera, vectors.write_vera, lambda values: values.inner),
    "PREFIX_TUNING": Method(virtual.read_prefix, virtual.write_prefix, lambda values: ()),
    "PROMPT_TUNING": Method(virtual.read_prompt, virtual.write_prompt, lambda values: ()),
    "P_TUNING": Method(virtual.read_prompt, virtual.write_p_tuning, lambda values: ()),
    "LLMTUNE_SEQUENTIAL": Method(bottleneck.read, bottleneck.write, lambda values: values.fields),
    "LLMTUNE_PARALLEL": Method(bottleneck.read, bottleneck.write, lambda values: ()),
    "LLMTUNE_FUSION": Method(bottleneck.read, bottleneck.write, lambda values: values.fields),
}


@dataclass(frozen=True)
class Adapter:
    """`method`: a row of METHODS; `values`: of that method's kind; `whole`: float32 weights in place of the base's, as ours."""

    method: str
    values: Any
    whole: Mapping[str, Any]
    base: str | None = None


def read_vocabulary_size(directory: Path, config: ModelConfig) -> int | None:
    """The vocabulary to which such a base must be resized before it takes this adapter; None where it does not say."""
    path = directory / WEIGHTS
    if not path.is_file():
        return None  # `read_adapter` says what is missing
    return whole.vocabulary_size(WeightDirectory(directory, read_header(path)), config)


def adapts_an_end(directory: Path) -> bool:
    """Whether the embedding or the head has an adapter of its own, which parts them where they are tied."""
    if not (directory / WEIGHTS).is_file() or not (directory / CONFIG).is_file():
        return False  # `read_adapter` says what is missing
    opened = open_peft(directory)
    return lora.adapts_an_end(opened) and not opened.settings.get("ensure_weight_tying")


def read_adapter(directory: Path, config: ModelConfig) -> Adapter:
    """An adapter for a model of this shape. Raises LlmtuneFormatError where it is of an unknown method or another base."""
    opened = open_peft(directory)
    form = str(opened.settings.get("peft_type"))
    method = ON_EXPERTS.get(form, form)
    if method not in METHODS:
        raise opened.refuse("peft_type", f"only {', '.join(METHODS)} adapters are read so far")
    values = METHODS[method].read(opened, config)
    brought = whole.read_whole(opened.weights, config, opened.settings)
    if values is None and not brought:
        raise LlmtuneFormatError(f"{opened.weights.path}: the adapter holds no tensors")
    return Adapter(method, values, brought, opened.settings.get("base_model_name_or_path"))


def write_adapter(
    directory: Path,
    method: str,
    values: Any,
    config: ModelConfig,
    *,
    base: str,
    whole_paths: Sequence[str] = (),
    fetch: whole.Fetch | None = None,
    complete: Callable[[Path], None] = lambda directory: None,
) -> None:
    """A directory that peft loads, where it has a form for this (`forms`). `values`: of the method's kind.

    `whole_paths`: of weights that `fetch` gives, which replace the base's. `complete` is called before the directory appears.
    Of several processes all call this, and the first writes.
    """
    entries, own = METHODS[method].write(values, config)
    adapted = METHODS[method].adapted(values)
    if fetch is not None:
        entries += whole.whole_entries(whole_paths, config, fetch, factored=adapted)
    settings = {
        "peft_type": form_of(method, adapted, dora=bool(own.get("use_dora"))),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "revision": None,
        **own,
        "modules_to_save": whole.module_names([path for path in whole_paths if path not in adapted]) or None,
    }
    if config.tie_word_embeddings and "embed/table" in whole_paths:
        settings["ensure_weight_tying"] = True
    entries = sorted(entries, key=lambda entry: entry.name)
    if jax.process_index() > 0:
        return take_part(entries)
    with new_directory(directory, sum(entry.nbytes for entry in entries)) as partial:
        write_file(partial / WEIGHTS, entries)
        write_json(partial / CONFIG, settings)
        complete(partial)
