"""The end of a run: the whole model as a Hugging Face directory, the adapter as a PEFT directory."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtune import pretrained
from llmtune.training.vocabulary import Vocabulary


def export_run(
    directory: Path,
    params: Any,
    source: pretrained.Source,
    vocabulary: Vocabulary,
    *,
    adapted: bool,
    whole: Sequence[str] = (),
) -> dict[str, Path]:
    """`{"model": ..., "adapter": ...}`, each complete or absent. What an earlier export left is replaced.

    The tokenizer of both knows the tokens that the run added. `whole`: the paths of weights that trained in whole beside
    the adapter, which therefore belong to it.
    """
    written = {"model": directory / "model"} | ({"adapter": directory / "adapter"} if adapted else {})
    for path in written.values():
        shutil.rmtree(path, ignore_errors=True)
    tokenizer = vocabulary.tokenizer
    pretrained.save(written["model"], params, source, companions=tokenizer, complete=vocabulary.complete)
    if adapted:
        pretrained.save_adapter(
            written["adapter"], params, source, whole=whole, companions=tokenizer, complete=vocabulary.complete
        )
    return written
