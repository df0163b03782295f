"""The end of a run: the whole model as a Hugging Face directory, the adapter as a PEFT directory.

What a run taught goes with the weights: added tokens, the chat template, and where an answer ends.

    generation_config.json of the model: {"eos_token_id": 128001}  -->  {"eos_token_id": [128001, 128009]}
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmtune import pretrained
from llmtune.data import RunData
from llmtune.tokenizers import write_chat_template
from llmtune.training.processes import is_first, wait_for_all
from llmtune.training.vocabulary import Vocabulary
from llmtune.transforms import not_mergeable, without_adapters


def export_run(
    directory: Path,
    params: Any,
    source: pretrained.Source,
    vocabulary: Vocabulary,
    data: RunData,
    *,
    adapted: bool,
    whole: Sequence[str] = (),
    base: Any = None,
    own_base: bool = False,
    papers: Callable[[Path, str], None] = lambda directory, kind: None,
) -> dict[str, Path]:
    """`{"model": ..., "base": ..., "adapter": ...}`, each complete or absent. What an earlier export left is replaced.

    Where the adapter cannot be merged there is no model, and what would lie beside it lies with the adapter. Of several
    processes all take part, the first writes, and none goes on before all is there.

    The tokenizer of both knows the tokens that the run added, and the chat template that it trained with. `whole`: the paths
    of weights that trained in whole beside the adapter, which therefore belong to it. `base`: see `pretrained.save`.
    `own_base`: the adapter stands on codes of its own, and their matrices go with it.
    `papers(directory, kind)` puts the card of a model or of an adapter into its directory.
    """
    paths = {kind: directory / kind for kind in ("model", "base", "adapter")}
    if is_first():
        for path in paths.values():
            shutil.rmtree(path, ignore_errors=True)
    merged = not_mergeable(params) is None
    tokenizer = vocabulary.tokenizer

    def complete(partial: Path) -> None:
        vocabulary.complete(partial)
        write_chat_template(partial, data.template)

    def complete_model(partial: Path) -> None:
        complete(partial)
        write_ends(partial, data.end_ids, known=tokenizer is None)
        papers(partial, "model")

    def complete_alone(partial: Path) -> None:
        complete(partial)
        ends = dict.fromkeys([*(source.config.eos_token_ids if tokenizer is None else ()), *data.end_ids])
        (partial / "generation_config.json").write_text(
            json.dumps({"eos_token_id": list(ends)}) + "\n", encoding="utf-8"
        )

    def complete_adapter(partial: Path) -> None:
        (complete if merged else complete_alone)(partial)
        pretrained.copy_notices(source, partial)
        papers(partial, "adapter")

    if merged:
        pretrained.save(paths["model"], params, source, tokenizer=tokenizer, base=base, complete=complete_model)
    if own_base:
        pretrained.save(paths["base"], without_adapters(params), source, tokenizer=tokenizer, complete=complete)
    if adapted:
        home = tokenizer if merged else tokenizer or source.tokenizer_directory
        pretrained.save_adapter(
            paths["adapter"], params, source, whole=whole, tokenizer=home, complete=complete_adapter,
            base=str(paths["base"].absolute()) if own_base else None,
        )  # fmt: skip
    wait_for_all("the export is there")
    parts = {"model": merged, "base": own_base, "adapter": adapted}
    return {kind: paths[kind] for kind, written in parts.items() if written}


def write_ends(directory: Path, ends: Sequence[int], *, known: bool) -> None:
    """Say in generation_config.json that text ends at these ids, beside those that it names, where they are `known` to hold.

    (They do not where the tokenizer is another than the model's.) Nothing is written where nothing is new.
    """
    path, config = directory / "generation_config.json", json.loads((directory / "config.json").read_text("utf-8"))
    own = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    named = own.get("eos_token_id", config.get("eos_token_id"))
    named = named if isinstance(named, list) else [] if named is None else [named]
    wanted = list(dict.fromkeys([*(named if known else ()), *ends]))
    if ends and set(wanted) != set(named):
        begins = {} if config.get("bos_token_id") is None else {"bos_token_id": config["bos_token_id"]}
        text = json.dumps({**(own or begins), "eos_token_id": wanted}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
