"""Merged weights out: a Hugging Face directory.

params with operators --> config.json, *.safetensors with index, tokenizer, generation_config.json, notices
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints_convert import companions, hf_weights
from llmtune.pretrained.host import fetch_from
from llmtune.pretrained.loading import Progress
from llmtune.pretrained.source import Source
from llmtune.transforms import weights_by_path


def save(
    path: Path,
    params: Any,
    source: Source,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    complete: Callable[[Path], None] = lambda directory: None,
    progress: Progress = lambda done: None,
) -> None:
    """A merged Hugging Face directory; config, notices and tokenizer (`tokenizer`: another's directory) beside the weights.

    Each tensor in `dtype`, or, where that is None, in its dtype on disk (for a preset: in the dtype that it names).
    `complete` puts into the directory what else belongs there, before it appears.
    """

    def finish(directory: Path) -> None:
        if tokenizer is not None:
            companions.replace_tokenizer(tokenizer, directory)
        complete(directory)

    hf_weights.save_directory(
        path,
        fetch_from(weights_by_path(params)),
        source.config,
        source.hf_config,
        source.directory,
        source.companions,
        dtype=dtype,
        stored_dtype=source.hf_config.get("dtype") or source.hf_config.get("torch_dtype") or "float32",
        complete=finish,
        progress=progress,
    )
