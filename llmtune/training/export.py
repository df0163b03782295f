"""The end of a run: the whole model as a Hugging Face directory, the adapter as a PEFT directory."""

import shutil
from pathlib import Path
from typing import Any

from llmtune import pretrained


def export_run(
    directory: Path, params: Any, source: pretrained.Source, *, tokenizer: Path | None, adapted: bool
) -> dict[str, Path]:
    """`{"model": ..., "adapter": ...}`, each complete or absent. What an earlier export left is replaced.

    `tokenizer`: the directory of one other than the model's own.
    """
    written = {"model": directory / "model"} | ({"adapter": directory / "adapter"} if adapted else {})
    for path in written.values():
        shutil.rmtree(path, ignore_errors=True)
    pretrained.save(written["model"], params, source, companions=tokenizer)
    if adapted:
        pretrained.save_adapter(written["adapter"], params, source)
    return written
