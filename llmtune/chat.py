"""Talking to a model: prompts as a user's turns, answers that end where the chat template ends a turn.

template = find_template(model, "runs/chat")
rows = [chat_prompt(template, "Hi", system="Be brief.")]
with_ends(model, template).generate(rows, max_new_tokens=64)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llmtune.config.file import load_run
from llmtune.errors import LlmtuneConfigError
from llmtune.model import Model
from llmtune.tokenizers import load_chat_template
from llmtune.tokenizers.chat import BUILT_IN, says_template
from llmtune.tokenizers.conversation import ChatTemplate
from llmtune.tokenizers.turns import end_ids


def find_template(
    model: Model, path: str | Path, choice: str | None = None, adapters: Sequence[str | Path] = ()
) -> ChatTemplate:
    """The template that was chosen, else the last adapter's that has one, else the run's, else the model's own.

    `adapters` are PEFT directories on top of the model at `path`: what they were trained with goes before what it was. A
    run's own .jinja file lies in its export, whatever became of the file that it was.
    """
    configuration, home = Path(path) / "config.yaml", model.source.tokenizer_directory
    if model.tokenizer is None or home is None:
        raise LlmtuneConfigError(f"{path}: it has no tokenizer, so nobody can talk to it; leave out --chat")
    theirs = next((Path(adapter) for adapter in reversed(adapters) if says_template(Path(adapter))), None)
    if choice is None and theirs is not None:
        home = theirs
    elif choice is None and configuration.is_file():
        trained = load_run(configuration).data.chat_template
        choice = trained if trained in BUILT_IN else None
    template = load_chat_template(home, model.tokenizer, choice)
    if template is None:
        raise LlmtuneConfigError(
            f"{path}: the model has no chat template; give --chat-template a built-in name or a .jinja file"
        )
    return template


def with_ends(model: Model, template: ChatTemplate) -> Model:
    """The same model; its completions end at the template's end of a turn too."""
    assert model.tokenizer is not None
    ends = tuple(dict.fromkeys((*end_ids(model.tokenizer, template), *model.config.eos_token_ids)))
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=ends))
