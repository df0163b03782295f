"""The one port to the outside: Hugging Face and PEFT directories in and out.

Everything else in llmtune uses these functions; they alone call `checkpoints_convert`, which alone knows other people's tensor
names and file formats.

    source = open_source("path/to/hf_dir")            config and tokenizer directory; weights stay on disk
    params = load(source, declared, mesh, strategy)   straight into shardings, tensor by tensor
    save(path, params, source)                        a Hugging Face directory, merged
    fit_to_adapter(source, path)                      the base with the vocabulary that a PEFT adapter was trained with
    load_adapter(path, config)                        a transform that adds it, and what it brings in whole
    save_adapter(path, params, source)                a PEFT directory
    check_adapter(path), resize_adapter, combine_adapter_files      PEFT directories as files
    export_quantized(source, target, "fp8")           8 bits, in the compressed-tensors layout
    convert(source, target, plan)                     between Hugging Face's, Meta's and Mistral's layouts
"""

from llmtune.pretrained.adapter_files import Finding, base_of, check_adapter, combine_adapter_files, resize_adapter
from llmtune.pretrained.adapters import (
    LoadedAdapter,
    as_exported,
    fit_to_adapter,
    form_note,
    load_adapter,
    read_factors,
    save_adapter,
)
from llmtune.pretrained.added import read_branches
from llmtune.pretrained.conversion import LAYOUTS, Converted, conversion_plan, convert, export_quantized
from llmtune.pretrained.saving import copy_notices, save, stored_matrices
from llmtune.pretrained.source import Progress, Resize, Source, load, open_source

__all__ = [
    "LAYOUTS",
    "Converted",
    "Finding",
    "LoadedAdapter",
    "Progress",
    "Resize",
    "Source",
    "as_exported",
    "base_of",
    "check_adapter",
    "combine_adapter_files",
    "conversion_plan",
    "convert",
    "copy_notices",
    "export_quantized",
    "fit_to_adapter",
    "form_note",
    "load",
    "load_adapter",
    "open_source",
    "read_branches",
    "read_factors",
    "resize_adapter",
    "save",
    "save_adapter",
    "stored_matrices",
]  # fmt: skip
